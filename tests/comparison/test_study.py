"""The study file: read with all its mistakes at once, and made into the run of each cell."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rotmole.comparison.grid import grown, trials
from rotmole.comparison.study import is_study, load_study
from rotmole.errors import ConfigError
from training_cases import run_file


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_study(path, overrides)
    return "\n".join(caught.value.problems)


def test_all_mistakes_of_the_file_at_once(study_yaml, tmp_path):
    file = yaml.safe_load(study_yaml.read_text())
    file |= {
        "sedes": [1],
        "equal": "parametres",
        "seeds": [0, 0],
        "threads": 0,
        "base": {"seed": 1},
    }
    file["methods"]["a/b"] = "lora"
    file["tune"]["seed"] = 3
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(file))
    text = problems(tmp_path / "x.yaml", "nonsense")
    for words in (
        "sedes: there is no such setting; did you mean 'seeds'?",
        "equal is 'parametres'; it must be one of parameters, rank, active_rank, none",
        "seeds: [0, 0] is not a list of seeds that differ",
        "threads: 0 must be at least 1",
        "base.seed cannot be set here: write seeds in the study file",
        "named by letters, digits and . _ + - alone, as folders are: 'a/b'",
        "tune.seed: there is no such setting; did you mean 'seeds'?",
        "'nonsense' is not of the form key=value",
    ):
        assert words in text, (words, text)


def test_mistakes_of_base_are_said_once_and_those_of_a_method_with_its_name(study_yaml):
    text = problems(
        study_yaml,
        "training.max_step=3",
        "model.dtype=float31",
        "methods.lora.adapter.rr=4",
        "methods.moe.adapter.rotation=tangnt",
        "methods.moe.training={lerning_rate: 1}",
    )
    assert text.count("max_step:") == 1
    assert "base.training.max_step: there is no such setting; did you mean" in text
    assert "base.model.dtype is 'float31'" in text
    assert "methods.lora.adapter.rr: there is no such setting" in text
    assert "methods.moe.adapter.rotation is 'tangnt'" in text
    assert "methods.moe.training.lerning_rate: there is no such setting" in text


def test_mistakes_of_held_out_tasks(study_yaml):
    text = problems(study_yaml, "held_out.colours.source=locale", "held_out.dutch.sauce=locale")
    assert "held_out.colours: base trains on a task of that name; give it another" in text
    text = problems(study_yaml, "held_out.dutch.source=locale", "held_out.dutch.kind=datse")
    assert "held_out.dutch: kind 'datse' is not known" in text
    assert "did you mean 'dates'" in text


def test_rules_between_settings(study_yaml):
    text = problems(
        study_yaml, "baseline=lore", "metrics=[nll, exact_macth]", "common=[target_modles]",
        "equal=rank", "parameters=3000", "tune.seeds=[0, 9]", "tune.grid.scael=[1, 1]",
    )  # fmt: skip
    for words in (
        "baseline is 'lore'; it must be one of lora, moe; did you mean 'lora'?",
        "did you mean 'exact_match'?",
        "did you mean 'target_modules'?",
        "parameters: 3000 is for equal: parameters",
        "tune.seeds: 0 are final seeds too",
        "tune.grid: 'scael' is no setting that is tuned",
        "tune.grid.scael: values appear twice",
    ):
        assert words in text, (words, text)


def test_a_warning_names_the_methods_that_it_is_about(study_yaml):
    with pytest.warns(UserWarning, match="constant weight 1") as caught:
        load_study(
            study_yaml,
            [
                "methods.moe.adapter={num_experts: 2, top_k: 1, rotation: none}",
                "methods.one={adapter: {num_experts: 3, top_k: 1, rotation: none}}",
            ],
        )
    said = [str(warning.message) for warning in caught]
    (constant,) = [text for text in said if "constant weight 1" in text]
    assert constant.startswith("methods moe, one: top_k=1 with norm_topk_prob=True")
    assert len(said) == len(set(said))


def test_a_grid_that_no_run_takes(study_yaml):
    text = problems(study_yaml, "tune.grid={training.learning_rate: [-1, 1e-3]}")
    assert "tune.grid, method lora: training.learning_rate is -1" in text


def test_a_grid_over_what_a_method_writes_itself(study_yaml):
    text = problems(
        study_yaml, "methods.lora.training={learning_rate: 0.1}", "tune.grid.scale=[1, 2]",
        "methods.moe.adapter.lora_alpha=99",
    )  # fmt: skip
    assert "methods.lora.training.learning_rate is 0.1, and tune.grid tries its own" in text
    assert (
        "methods.moe.adapter.lora_alpha is 99, and tune.grid tries its own values of scale" in text
    )
    assert load_study(study_yaml, ["base.training.learning_rate=0.1"])  # for all, as a default


@pytest.mark.parametrize(
    ("equal", "key", "said"),
    [
        ("parameters", "num_experts", "3 makes its parameters "),
        ("rank", "r", "3 makes its rank 3 in place of 8"),
        ("active_rank", "top_k", "3 makes its active rank 24 in place of 16"),
    ],
)
def test_a_grid_that_changes_what_is_made_equal(study_yaml, equal, key, said):
    methods = "methods={a: {adapter: {rotation: none}}, b: {adapter: {rotation: plane}}}"
    changes = [f"equal={equal}", f"tune.grid={{adapter.{key}: [3]}}", methods, "baseline=a"]
    text = problems(study_yaml, *changes)
    assert f"tune.grid, method b: adapter.{key} {said}" in text


def test_a_grid_of_adapter_settings_that_leave_the_size(study_yaml):
    study = load_study(study_yaml, ["tune.grid={adapter.lora_dropout: [0, 0.1]}"])
    assert (
        study.run_of("moe", settings={"adapter.lora_dropout": 0.1}).adapter["lora_dropout"] == 0.1
    )


def test_methods_that_need_trained_adapters_are_refused_by_name(study_yaml):
    text = problems(study_yaml, "equal=parameters", "methods.x={adapter: {peft_type: XLORA}}")
    assert "methods.x.adapter.peft_type: XLORA cannot be trained here: it needs trained" in text


def test_the_run_of_a_cell(study_yaml):
    study = load_study(
        study_yaml, ["methods.moe.training={weight_decay: 0.5}", "base.adapter.lora_dropout=0.25"]
    )
    run = study.run_of("moe", seed=9, settings={"training.learning_rate": 3e-3}, folder="there")
    assert run.seed == 9
    assert run.output_dir == "there"
    assert run.evaluation.split == "test"
    assert run.training["weight_decay"] == 0.5
    assert run.training["learning_rate"] == 3e-3
    assert run.adapter["target_modules"] == {"q_proj", "v_proj"} or sorted(
        run.adapter["target_modules"]
    ) == ["q_proj", "v_proj"]
    assert run.adapter["lora_dropout"] == 0.25
    lora = study.run_of("lora")
    assert "weight_decay" not in lora.training
    assert lora.adapter["peft_type"] == "LORA"
    assert lora.adapter["lora_dropout"] == 0.25
    assert lora.adapter["lora_alpha"] == 2 * lora.adapter["r"]  # base's 8 / 4


def test_paths_start_at_their_own_files(study_yaml, tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    content = yaml.safe_load(study_yaml.read_text())
    content["base"] = "../run.yaml"
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    run = yaml.safe_load((study_yaml.parent / "run.yaml").read_text())
    run["data"]["root"] = "rows"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(tmp_path.parent)
    study = load_study(folder / "study.yaml")
    assert study.folder == folder / "study"
    assert study.file.base["data"]["root"] == str(tmp_path / "rows")
    assert load_study(folder / "study.yaml", output="here").folder == Path("here")


def test_a_run_file_is_no_study(study_yaml):
    assert is_study(study_yaml)
    assert not is_study(study_yaml.parent / "run.yaml")
    assert not is_study(study_yaml.parent / "no.yaml")
    assert run_file  # the two kinds of file are told apart by the key `methods`


@pytest.mark.parametrize(
    ("values", "best", "more"),
    [
        ([1e-3, 2e-3, 4e-3], 4e-3, 8e-3),
        ([1e-3, 2e-3, 4e-3], 1e-3, 5e-4),
        ([4e-3, 1e-3], 1e-3, 2.5e-4),
        ([1e-3, 2e-3, 4e-3], 2e-3, None),
        ([1e-3], 1e-3, None),
        ([0, 1e-3], 0, None),
    ],
)
def test_the_value_that_a_grid_lacks(values, best, more):
    assert grown(values, best) == (None if more is None else pytest.approx(more))


def test_settings_without_effect_are_not_tried_twice(study_yaml):
    grid = {
        "training.learning_rate": [1e-3, 2e-3],
        "optimizer.rotation_gate_lr": [1e-4, 1e-3],
        "scale": [1.0, 2.0],
    }
    methods = (
        "methods={lora: {adapter: {peft_type: LORA, r: 16}}, moe: moe_lora, ours: rotmole, "
        "hra: {adapter: {peft_type: HRA}}}"
    )
    study = load_study(study_yaml, [methods])
    counts = {name: len(trials(study.adapter_of(name), grid)) for name in study.file.methods}
    assert counts == {"lora": 4, "moe": 4, "ours": 8, "hra": 2}
    run = study.run_of("ours", settings={"scale": 4.0, "optimizer.rotation_gate_lr": 1e-4})
    assert run.adapter["lora_alpha"] == 4 * run.adapter["r"]
    assert run.optimizer.rotation_gate_lr == 1e-4
    raised = run.adapter.get("rank_pattern") or {}
    assert run.adapter.get("alpha_pattern") == {k: 4 * rank for k, rank in raised.items()} or (
        not raised
    )


def test_no_final_seeds_need_something_to_tune(study_yaml):
    assert "seeds: there are none, and nothing is tuned" in problems(
        study_yaml, "seeds=[]", "tune=null"
    )
    assert load_study(study_yaml, ["seeds=[]"]).file.first_seed == 7
