from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import yaml
from trl import SFTConfig

import rotmole.config
from rotmole.config.adapter import adapter_hints
from rotmole.config.load import load_run, resolved_yaml, sft_arguments
from rotmole.config.schema import RunFile, TaskSection
from rotmole.config.training import REFUSED, training_hints
from rotmole.data import data_problems
from rotmole.errors import ConfigError

GOOD = """
output_dir: runs/x
model: {device: cpu}
adapter: {r: 8, rotation: plane}
data:
  tasks:
    colours: {source: jsonl, files: {train: a.jsonl, validation: b.jsonl}}
training: {learning_rate: 1e-4}
"""
TEMPLATES = sorted(Path(rotmole.config.__file__).parent.glob("templates/*.yaml"))


def problems(*overrides, text=GOOD):
    with pytest.raises(ConfigError) as caught:
        load_run("run.yaml", overrides, text)
    return caught.value.problems


def only(*overrides, text=GOOD):
    (problem,) = problems(*overrides, text=text)
    return problem


def test_a_good_file_and_overrides():
    run = load_run("x", ["seed=7", "training.max_steps=20", "model.dtype=float32"], GOOD)
    assert (run.seed, run.training["max_steps"], run.model.dtype) == (7, 20, "float32")
    assert run.adapter == {"r": 8, "rotation": "plane"}


def test_a_file_on_disk(tmp_path):
    path = tmp_path / "läufe.yaml"
    path.write_text("\ufeff" + GOOD, encoding="utf-8")
    assert load_run(path).output_dir == str(tmp_path / "runs/x")


@pytest.mark.parametrize("value", ["1e-4", "'1e-4'", "0.0001"])
def test_numbers_in_every_spelling(value):
    text = GOOD.replace("1e-4", value)
    run = load_run("x", [f"adapter.router_aux_loss_coef={value}"], text)
    assert run.training["learning_rate"] == 1e-4
    assert run.adapter["router_aux_loss_coef"] == 1e-4
    assert type(run.adapter["router_aux_loss_coef"]) is float


def test_the_resolved_file_is_the_same_run():
    run = load_run("x", ["output_dir=/runs/x", "data.root=/rows"], GOOD)
    again = load_run("x", [], resolved_yaml(run))
    assert again == run
    assert sft_arguments(again) == sft_arguments(run)


def test_paths_are_relative_to_the_run_file(tmp_path, monkeypatch):
    (tmp_path / "sub" / "model").mkdir(parents=True)
    file = tmp_path / "sub" / "run.yaml"
    file.write_text(GOOD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for path in ("sub/run.yaml", file, "../" + tmp_path.name + "/sub/run.yaml"):
        run = load_run(path)
        for value, name in ((run.output_dir, "runs/x"), (run.data.root, "")):
            assert Path(value).resolve() == (tmp_path / "sub" / name).resolve()
    monkeypatch.chdir(tmp_path / "sub")
    assert load_run("run.yaml").output_dir == "runs/x"
    monkeypatch.chdir(tmp_path)
    run = load_run("sub/run.yaml", ["output_dir=out", "data.root=rows"])
    assert (run.output_dir, run.data.root) == ("out", "rows")
    resolved = load_run("x", [], resolved_yaml(run))
    assert resolved.output_dir == str(tmp_path / "out")
    assert resolved.data.root == str(tmp_path / "rows")


def test_a_local_model_is_found_beside_the_run_file(tmp_path, monkeypatch):
    (tmp_path / "sub" / "models").mkdir(parents=True)
    file = tmp_path / "sub" / "run.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(GOOD) | {"model": {"name": "models"}}))
    monkeypatch.chdir(tmp_path)
    assert load_run("sub/run.yaml").model.name == "sub/models"
    assert load_run("sub/run.yaml", ["model.name=org/hub"]).model.name == "org/hub"


METHOD = "adapter: {num_experts: 8, top_k: 3, rotation: plane, r: 5, target_modules: [q_proj]}"


def test_a_preset_on_the_command_line_wins_over_the_file():
    text = yaml.safe_dump(yaml.safe_load(GOOD) | yaml.safe_load(METHOD))
    with pytest.warns(UserWarning, match="replaces num_experts, rotation, top_k of run"):
        run = load_run("run", ["adapter.preset=lora"], text)
    config = run.adapter_config
    assert (config.num_experts, config.rotation, config.r) == (1, "none", 5)
    assert config.target_modules == {"q_proj"}
    words = ["adapter.preset=lora", "adapter.rotation=givens"]
    with pytest.raises(ConfigError, match=r"rotation is 'givens' but adapter.preset is 'lora'"):
        load_run("run", words, GOOD.replace(", rotation: plane", ""))


@pytest.mark.parametrize(
    ("preset", "setting", "ok"),
    [
        ("lora", "rotation: tangent", False), ("lora", "num_experts: 2", False),
        ("lora", "r: 64", True), ("moe_lora", "num_experts: 8", True),
        ("moe_lora", "num_experts: 1", False), ("moe_lora", "rotation: plane", False),
        ("switch", "norm_topk_prob: true", False), ("switch", "top_k: 2", False),
        ("loramoe", "router_task_loss_coef: 0.0", False), ("loramoe", "num_experts: 4", True),
        ("hydralora", "share_A: false", False), ("goat", "goat_eta: 0.5", True),
        ("goat", "goat_eta: null", False), ("mola", "num_experts_pattern: [4, 8]", True),
    ],
)  # fmt: skip
def test_a_setting_that_contradicts_a_preset_is_an_error(preset, setting, ok):
    adapter = f"adapter: {{preset: {preset}, {setting}, target_modules: [q_proj]}}"
    text = yaml.safe_dump(yaml.safe_load(GOOD) | yaml.safe_load(adapter))
    if ok:
        assert load_run("run", [], text).adapter_config
        return
    name = setting.partition(":")[0]
    with pytest.raises(ConfigError, match=f"adapter.{name} is .* but adapter.preset is '{preset}'"):
        load_run("run", [], text)


def test_every_name_of_another_tool_leads_to_a_setting():
    from rotmole.config.names import HINTS, OTHER_NAMES, TASK, places

    here = {f"adapter.{name}" for name in adapter_hints()} | set(RunFile.model_fields)
    here |= {f"training.{name}" for name in training_hints()}
    for name, field in RunFile.model_fields.items():
        here |= {f"{name}.{key}" for key in getattr(field.annotation, "model_fields", {})}
    here |= {f"{TASK}.{key}" for key in TaskSection.model_fields}
    assert not {new for new in places().values() if new not in here}
    assert set(HINTS) <= set(OTHER_NAMES)
    assert not set(OTHER_NAMES) & set(training_hints()), "these are settings here too"
    assert not set(OTHER_NAMES) & set(adapter_hints())


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("lr", "training.learning_rate"), ("training.lr", "training.learning_rate"),
        ("training.epochs", "training.num_train_epochs"),
        ("training.batch_size", "training.per_device_train_batch_size"),
        ("adapter.rank", "adapter.r"), ("adapter.alpha", "adapter.lora_alpha"),
        ("lora_dropout", "adapter.lora_dropout"), ("training.dropout", "adapter.lora_dropout"),
        ("bf16", "training.bf16"), ("training.max_seq_length", "training.max_length"),
        ("training.warmup_ratio", "training.warmup_steps"), ("model.torch_dtype", "model.dtype"),
        ("model.load_in_4bit", "model.quantization"), ("target_modules", "adapter.target_modules"),
        ("model.learning_rate", "training.learning_rate"),
        ("data.tasks.a.epochs", "training.num_train_epochs"),
        ("data.val_set_size", "data.tasks.NAME.validation_fraction"),
        ("optimizer.lr", "training.learning_rate"), ("evaluation.prompt", "data.tasks.NAME.prompt"),
    ],
)  # fmt: skip
def test_a_setting_of_another_tool_or_section_is_led_home(key, place):
    with pytest.raises(ConfigError, match=f"no such setting; did you mean '{place}'"):
        load_run("x", [f"{key}=1"], GOOD)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["training.lr_scheduler_type=warmup_stable_decay"], "'warmup_stable_decay' cannot be"),
        (["training.lr_scheduler_type=cosine_with_min_lr"], "min_lr"),
        (["training.optim=lomo"], "lomo_optim"),
        (["training.optim=schedule_free_adamw"], "schedulefree"),
    ],
)
def test_optimizer_and_schedule_are_built_before_the_model_is_loaded(settings, words):
    with pytest.raises(ConfigError, match=words):
        load_run("x", settings, GOOD)
    good = [
        "training.lr_scheduler_type=warmup_stable_decay",
        "training.lr_scheduler_kwargs={num_decay_steps: 2, num_stable_steps: 2}",
    ]
    assert load_run("x", good, GOOD)


def test_a_large_rate_is_said_once():
    with pytest.warns(UserWarning, match="learning_rate is 5") as said:
        load_run("x", ["training.learning_rate=5"], GOOD)
    assert len(said) == 1


@pytest.mark.parametrize("commit", ["1234e56", "0e00000", "12345678"])
def test_a_short_commit_that_looks_like_a_number_is_still_that_commit(commit):
    run = load_run("x", [f"model.revision='{commit}'"], GOOD)
    assert load_run("x", [], resolved_yaml(run)).model.revision == commit


def test_all_mistakes_at_once():
    text = """
sed: 3
output_dir: ""
model: {nme: foo, dtype: bf16}
adapter: {rotaton: tangent, rotation: tangnt, lora_dropout: 1.5, r: many, revision: x}
data:
  tasks:
    a: {source: jsnl, files: {trian: x.jsonl, validation: [1, 2]}}
    b: {files: {train: a}, weight: -1}
    c: {source: locale, kind: units, metrics: [exact_macth]}
training: {lerning_rate: 1, eval_packing: true, optim: adamw_troch, max_steps: two, bf16: 3,
           per_device_train_batch_size: 0}
evaluation: {split: dev}
"""
    sentences = problems("foo", "seed=-1", text=text)
    expected = [
        "'foo' is not of the form key=value",
        "seed: -1 must be at least 0",
        "sed: there is no such setting; did you mean 'seed'?",
        "output_dir is empty: folder that the run writes to",
        "model.nme: there is no such setting; did you mean 'name'?",
        "model.dtype is 'bf16'; it must be one of auto, float32, bfloat16, float16",
        "adapter.rotaton: there is no such setting; did you mean 'rotation'?",
        "adapter.rotation is 'tangnt'",
        "did you mean 'tangent'?",
        "adapter.lora_dropout is 1.5",
        "adapter.r: 'many' is not a whole number",
        "adapter.revision cannot be set here",
        "data.tasks.a.source is 'jsnl'; it must be one of",
        "did you mean 'jsonl'?",
        "a key of data.tasks.a.files is 'trian'; it must be one of train, validation, test; did",
        "data.tasks.a.files.validation: [1, 2] is not text or a list of text",
        "data.tasks.b.weight: -1 must be above 0",
        "data.tasks.c.metrics is 'exact_macth'; it must be one of",
        "training.lerning_rate: there is no such setting; did you mean 'learning_rate'?",
        "training.eval_packing cannot be set here: validation scores rows one by one",
        "training.optim is 'adamw_troch'; it must be one of",
        "training.max_steps: 'two' is not a whole number",
        "training.bf16: 3 is not true or false",
        "training.per_device_train_batch_size is 0; it must be a whole number of at least 1",
        "evaluation.split is 'dev'; it must be one of train, validation, test",
    ]
    for words in expected:
        assert any(words in problem for problem in sentences), words
    assert len(sentences) == len(expected) - 2  # two suggestions stand beside their mistakes
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.top_k=9", "adapter.top_k is 9 but num_experts is 4"),
        (
            "adapter={r: 7, rotation: givens}",
            "adapter: rotation 'givens' pairs coordinates and needs an even rank",
        ),
        ("adapter.num_experts=0", "num_experts is 0"),
        ("adapter.lora_dropout=1.5", "lora_dropout is 1.5"),
        ("adapter.router_aux_loss_coef=-1", "router_aux_loss_coef is -1"),
        ("adapter.r=true", "adapter.r: True is not a whole number"),
        ("adapter.target_modules=3", "target_modules: 3 is not a list of text or text or null"),
    ],
)
def test_adapter_rules(override, words):
    assert words in only(override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rate=-1", "must be a number of at least 0"),
        ("training.learning_rate=.inf", "must be a number of at least 0"),
        ("training.max_steps=0", "must be a whole number of at least 1, or -1"),
        ("training.adam_beta1=1", "below 1"),
        ("training.num_train_epochs=0", "a number above 0"),
        ("training.lr_scheduler_type=cosin", "did you mean 'cosine'"),
        ("training.eval_strategy=sometimes", "must be one of no, steps, epoch"),
        ("training.fp16=true", "needs a GPU"),
        ("training.report_to=tensorbord", "did you mean 'tensorboard'"),
        ("training.max_length=0", "at least 1"),
        ("training.metric_for_best_model=eval_acuracy", "must be one of eval_loss, eval_"),
        ("training.metric_for_best_model=eval_los", "did you mean 'eval_loss'?"),
        ("seed=5000000000", "seed"),
        ("training={load_best_model_at_end: true, save_strategy: epoch}", "training: "),
        ("training.use_liger_kernel=true", "pip install liger-kernel"),
    ],
)
def test_training_rules(override, words):
    assert words in only(override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data.tasks.colours.languages=de",
            "languages: 'de' is not a list of text or null; write [de]",
        ),
        ("data.tasks.colours.metrics=chrf", "; write [chrf]"),
        ("model=smollm2-135m", "a mapping of settings; write model: {name: smollm2-135m}"),
        ("evaluation=test", "evaluation: 'test' is not a mapping of settings."),
    ],
)
def test_a_lone_value_is_shown_as_it_is_written(override, words):
    assert words in only(override) + "."


def test_precisions_exclude_each_other():
    text = GOOD.replace("{device: cpu}", "{}")
    assert any("choose one" in p for p in problems("training={bf16: true, fp16: true}", text=text))


def test_two_names_of_one_setting():
    override = "training={gradient_checkpointing: true, activation_checkpointing: true}"
    assert "two names of one setting" in only(override)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_we_own_is_refused_with_the_reason(name):
    assert only(f"training.{name}=1") == f"training.{name} cannot be set here: {REFUSED[name]}"


def test_we_refuse_nothing_that_does_not_exist():
    assert set(REFUSED) <= set(training_hints())


def test_validation_needs_rows():
    text = GOOD.replace(", validation: b.jsonl", "")
    assert "needs validation rows" in only("training.eval_strategy=epoch", text=text)
    assert sft_arguments(load_run("x", [], text)).get("eval_strategy", "no") == "no"
    assert sft_arguments(load_run("x", [], GOOD))["eval_strategy"] == "steps"


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("training={max_steps: 3, num_train_epochs: 2}", "training.num_train_epochs"),
        ("training={save_strategy: epoch, save_steps: 5, eval_strategy: epoch}", "training.save"),
        ("optimizer={rotation_gate_lr: 1}", "optimizer.rotation_gate_lr"),
        ("data.temperature=2", "data.temperature"),
        ("data.tasks.colours.weight=2", "data.tasks.colours.weight"),
        ("adapter={num_experts: 1, router_aux_loss_coef: 1}", "router_aux_loss_coef"),
    ],
)
def test_a_setting_without_effect_warns_once_by_name(override, name):
    overrides = [override]
    if "rotation_gate" in override:
        overrides.append("adapter.rotation=none")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_run("x", overrides, GOOD)
    messages = [str(notice.message) for notice in caught]
    assert len(messages) == 1
    assert name in messages[0]
    assert "has no effect" in messages[0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("=3", "is not of the form key=value"),
        ("a..b=3", "is not of the form key=value"),
        ("output_dir.x=3", "output_dir holds no settings"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_overrides_that_make_no_sense(entry, words):
    assert any(words in problem for problem in problems(entry))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- 1\n- 2", "a run file is a mapping"),
        (b"", "output_dir is missing"),
        (b"a: \xff\xfe", "not UTF-8"),
        (b"a: 1\na: 2", "appears twice"),
    ],
)
def test_files_that_are_no_run_file(tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_run(path)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path):
    (tmp_path / "other.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no such file \(there is other\.yaml\)"):
        load_run(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="it is a folder"):
        load_run(tmp_path)


def test_further_looks_are_reported_with_the_rest():
    with pytest.raises(ConfigError) as caught:
        load_run(
            "x",
            ["seed=-1"],
            GOOD,
            data_problems=lambda data: [f"data: {sorted(data.tasks)}"],
            model_problems=lambda model, config, loras: [f"model: {model.device} {config.r}"],
        )
    assert caught.value.problems == [
        "seed: -1 must be at least 0",
        "model: cpu 8",
        "data: ['colours']",
    ]


def test_the_arguments_are_ones_a_cpu_can_use():
    arguments = sft_arguments(load_run("x", [], GOOD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = SFTConfig(**arguments)
    assert (config.bf16, config.fp16, config.gradient_checkpointing) == (False, False, False)
    assert config.use_cpu
    assert config.max_length == 512
    assert config.learning_rate == 1e-4
    assert config.report_to == []
    unwanted = (config.dataloader_pin_memory, config.remove_unused_columns, config.packing)
    assert not any(unwanted)
    assert (config.seed, config.data_seed) == (0, 0)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_either_name(name):
    arguments = sft_arguments(load_run("x", [f"training.{name}=true"], GOOD))
    config = SFTConfig(**arguments)
    assert config.gradient_checkpointing is True


def test_checking_claims_no_device():
    """SFTConfig takes a device for the whole process when it is made; checking must not."""
    from accelerate.state import PartialState

    PartialState._reset_state()
    load_run("x", [], GOOD)
    assert PartialState._shared_state == {}


def rows_for(task, folder):
    row = {
        "text": "a film", "label": 0, "question": "why", "choices": ["a", "b"], "answer": 1,
        "body": "long", "title": "short", "lang": "de",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }  # fmt: skip
    for name in task.get("files", {}).values():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        table = "question,answer\n" + "why,so\n" * 3
        file.write_text(table if file.suffix == ".csv" else (json.dumps(row) + "\n") * 3)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_is_right(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(template.read_text(encoding="utf-8"))
    for task in raw["data"]["tasks"].values():
        rows_for(task, tmp_path / raw["data"].get("root", "."))
    file = tmp_path / "run.yaml"
    file.write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    run = load_run(file, data_problems=data_problems)
    SFTConfig(**sft_arguments(run))
    assert all(len(line) <= 100 for line in template.read_text().splitlines())


def test_the_templates_are_the_promised_ones():
    names = {"quickstart", "multitask-jsonl", "chat-sft", "csv", "hub", "quantised", "multi-gpu"}
    assert {path.stem for path in TEMPLATES} == names
