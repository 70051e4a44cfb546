"""What `make pages` writes is what is committed: list of files, table of the demo, picture."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from docs_scripts import script
from judged_cases import made_results
from rotmole.comparison.judge import judge
from rotmole.comparison.judgement import Judgement, write_judgement

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"


def test_files_md_lists_every_source_file_by_its_first_line() -> None:
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert page == script("files").text(), "run `make pages`"


def test_every_source_file_has_a_first_line() -> None:
    files = script("files")
    empty = [file for file in (ROOT / "src").rglob("*.py") if not files.first_line(file)]
    assert not empty


def test_the_readmes_table_is_that_of_the_committed_demo() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == script("demo_table").with_table(readme), "run `make pages`"


def test_the_table_of_the_gates_parameters_is_computed() -> None:
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert page == script("gate_table").page(page), "run `make pages`"


def test_the_table_of_growing_is_that_of_the_committed_figures() -> None:
    page = (ROOT / "docs" / "grow.md").read_text(encoding="utf-8")
    assert page == script("grow_table").page(page), "run `make pages`"


def test_the_table_of_the_load_test_is_that_of_the_committed_figures() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert page == script("load_table").page(page), "run `make pages`"


def test_the_tables_of_the_static_lora_are_those_of_the_committed_export() -> None:
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    assert page == script("static_table").page(page), "run `make pages`"


def test_the_price_of_the_published_studies_is_that_of_the_committed_figures() -> None:
    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    assert page == script("published_table").page(page), "run `make pages`"


def test_the_results_are_those_of_the_committed_studies(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    results = script("results")
    assert page == results.page(page, pictures=tmp_path), "run `make pages`"
    for picture in tmp_path.iterdir():
        assert same(picture.read_text(encoding="utf-8"), PICTURES / picture.name), (
            "run `make pages`"
        )


@pytest.mark.slow
def test_every_studys_own_tables_and_figures_are_those_of_its_file(tmp_path: Path) -> None:
    results = script("results")
    results.write_studies(to=tmp_path)
    made = {file.relative_to(tmp_path) for file in tmp_path.rglob("*.*")}
    committed = {file.relative_to(results.RESULTS) for file in results.RESULTS.glob("*/**/*.*")}
    assert made == committed, "run `make pages`"
    names = {file.parts[0] for file in made}
    assert names >= {file.stem for file in results.RESULTS.glob("*.json")}
    for file in made:
        text, there = (tmp_path / file).read_text(encoding="utf-8"), results.RESULTS / file
        if file.suffix == ".svg":
            assert same(text, there), f"{file}: run `make pages`"
        else:
            assert text == there.read_text(encoding="utf-8"), f"{file}: run `make pages`"


def test_the_readme_quotes_the_answer() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = script("results")
    assert readme == results.quoted(readme), "run `make pages`"
    assert f"- {results.sentences()[0]}" in readme


def test_the_answer_says_what_a_planted_study_has(tmp_path: Path) -> None:
    """Who beats LoRA, who loses, where no difference was found, and pairs that are no claims."""
    effects = dict(lora=0.0, moe_lora=0.25, tangent=0.25, offset=0.5, scale=0.0, shared=-0.25)
    judgement = judge(made_results(effects, seeds=range(9)))
    write_judgement(judgement, tmp_path / "q1.json")
    first, rotation, reasons, own, rates, *_ = script("results").sentences(tmp_path)

    def shown(method: str) -> str:
        estimate = judgement.difference(method, "nll").estimate
        return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"

    assert "nine seeds: one of five forms beats one tuned LoRA (MoE-LoRA with an always-" in first
    assert f"three lose to it (MoE-LoRA {shown('moe_lora')}; RotMoLE" in first
    assert f"one: no difference found (`scale` {shown('scale')})" in first
    assert "no difference was found for one (RotMoLE with its default gates " in rotation
    assert "RotMoLE with its default gates is better than `offset` (-0.2" in reasons
    assert "RotMoLE with its default gates is worse than `scale` (+0.2" in reasons
    assert "always-on expert is better than MoE-LoRA (-0.5" in reasons
    assert own == "No study was judged by its tasks' own metrics."
    assert "LoRA's best is" in rates


def test_few_experts_are_compared_with_as_many_without_rotation(tmp_path: Path) -> None:
    effects = dict(lora=0.0, tangent_e1_k1=0.5, none_e2_k1=0.5, cayley_e2_k1=0.0)
    effects |= dict(moe_lora=0.25, cayley_h4=0.25, radar_pairs=-0.25)
    judgement = judge(made_results(effects, seeds=range(3)))
    write_judgement(judgement, tmp_path / "q3.json")
    results, answers = script("results"), script("answers")
    said = results.sentences(tmp_path)[2]

    def shown(one: str, other: str) -> str:
        return answers.written(answers.difference(judgement, one, other))

    assert "three seeds" in said
    assert f"better at E = 2, K = 1 ({shown('cayley_e2_k1', 'none_e2_k1')})" in said
    assert f"worse at E = 1, K = 1 ({shown('tangent_e1_k1', 'lora')})" in said
    assert "no difference was found at one of three (means " in said
    pairs = shown("radar_pairs", "moe_lora")
    assert f"for RadarGate's pairs better at E = 4, K = 2 ({pairs})" in said
    assert "Of all 6 forms one is better than one tuned LoRA in NLL and four are worse." in said
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    part = results.page(page, tmp_path, tmp_path).partition("<!-- q3 -->")[2]
    (line,) = [line for line in part.splitlines() if line.startswith("| 2, 1 |")]
    scores = [judgement.score(name, "nll").value for name in ("none_e2_k1", "cayley_e2_k1")]
    assert line.startswith(f"| 2, 1 | {scores[0]:.4f} | {scores[1]:.4f} | -0.")
    assert "K = 1" in (tmp_path / "results-q3-experts.svg").read_text(encoding="utf-8")


def test_few_experts_have_their_own_metric_where_it_was_measured(tmp_path: Path) -> None:
    """Planted: two experts are better turned, in share of right answers as in loss."""
    shifts = dict(lora=0.0, none_e2_k1=0.5, cayley_e2_k1=-0.5)
    study = judge(made_results(shifts, seeds=range(3), rows=200))
    text = script("results").few_experts(study, study, tmp_path)
    table = text.partition("**By number of experts, exact_match, ")[2].splitlines()
    (line,) = [line for line in table if line.startswith("| 2, 1 |")]
    scores = [study.score(name, "own metric").value for name in ("none_e2_k1", "cayley_e2_k1")]
    assert line.startswith(f"| 2, 1 | {scores[0]:.3f} | {scores[1]:.3f} | +0.")
    assert "exact_match" not in script("results").few_experts(study, None, tmp_path)
    answers = script("answers")
    more = answers.difference(study, "cayley_e2_k1", "none_e2_k1", "own metric")
    said = answers.few_experts(study, study)
    shown = f"for rotation gates better at E = 2, K = 1 ({answers.written(more)})"
    assert f"By exact_match, trained again: {shown}" in said
    assert "exact_match" not in answers.few_experts(study)


def test_gates_rates_are_said_beside_the_default_rotation() -> None:
    """Planted: slow scaling gates are better, a balance loss is worse, fast gates are neither."""
    made = made_results(dict(tangent=0.0, slow_router=-0.5, fast_router=0.0, balance_01=0.5))
    said = script("answers").gates(judge(made))
    assert said.startswith("own rates of the gates and a balance loss move RotMoLE with its ")
    assert "(three settings, eight seeds, by intervals: one better (scaling gates at a rate" in said
    assert " and one worse (a balance loss of 0.01 +0." in said
    even = judge(made_results(dict(tangent=0.0, slow_router=0.0)))
    assert script("answers").gates(even).endswith("by intervals: none decided)")


def test_a_repeated_study_says_who_tuned_it_and_whether_it_claims(tmp_path: Path) -> None:
    results, shifts = script("results"), dict(lora=0.0, moe_lora=0.5)
    for seeds, ending in ((3, "three seeds: intervals, no claims."), (8, "eight seeds, 2 claims.")):
        judgement = judge(made_results(shifts, seeds=range(seeds), rows=200))
        write_judgement(judgement, tmp_path / "again.json")
        study = results.Study("again", "again", 1, "another.yaml", "own metric")
        text = results.shown(study, tmp_path, tmp_path)
        assert text.startswith(f"**Again.** Rates tuned by another.yaml, {ending}")
        assert "![differences-own-metric]" in text


def test_too_few_seeds_for_a_claim_leave_what_intervals_decide(tmp_path: Path) -> None:
    effects = dict(lora=0.0, moe_lora=0.5, rotmole=-0.5, shared=0.0)
    judgement = judge(made_results(effects, seeds=range(3)))
    write_judgement(judgement, tmp_path / "q2_glue.json")
    results = script("results")
    said = results.sentences(tmp_path)[1]
    assert "On mixed GLUE, three seeds (intervals, no claims): one of three forms is better" in said
    assert "better than one tuned LoRA (RotMoLE with its default gates -0." in said
    assert "one is worse than it (MoE-LoRA +0." in said
    assert "one: no difference found (MoE-LoRA with an always-on expert" in said
    brief = script("answers").against_lora(judgement, "Here", brief=True)
    assert brief.endswith("; one is worse than it; one: no difference found.")
    assert "(RotMoLE with its default gates -0." in brief
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    text = results.page(page, tmp_path, tmp_path)
    assert "pictures/results-q2_glue-convergence.svg" in text
    assert (tmp_path / "results-q2_glue-convergence.svg").is_file()


def test_mixtures_without_a_difference_share_a_sentence() -> None:
    noise = dict(lora=0.0, moe_lora=0.0, rotmole=0.0)
    glue = judge(made_results(noise, seeds=range(3)))
    qa = judge(made_results(noise, seeds=range(5, 8)))
    said = script("answers").other_mixtures({"q2_glue": glue, "q2_qa": qa})
    assert said.startswith("On mixed GLUE and mixed QA, three seeds (intervals, no claims): no ")
    assert said.count("one tuned LoRA") == 1
    assert said.count(" to ") == 2
    claims = judge(made_results(noise))  # eight seeds
    said = script("answers").other_mixtures({"q2_glue": claims})
    assert "no claims" not in said
    found = judge(made_results(noise | {"rotmole": -0.5}, seeds=range(3)))
    said = script("answers").other_mixtures({"q2_glue": glue, "q2_qa": found})
    assert said.count("one tuned LoRA") == 2
    assert "is better than one tuned LoRA" in said


def test_what_nobody_trained_on_is_said_beside_what_chance_gives() -> None:
    """Planted: on held-out tasks one form is worse in the first study, none in the other."""

    def planted(shift: float) -> Judgement:
        shifts = dict(lora=0.0, moe_lora=shift, rotmole=0.0)
        tasks: dict[str, tuple[str, ...]] = {"dates": ("de", "fr"), "dutch": ("nl",)}
        made = made_results(shifts, seeds=range(3), tasks=tasks)
        return judge(replace(made, held_out=("dutch",)))

    unseen = script("answers").unseen
    found = {"q1": planted(0.5), "q2_qa": planted(0.0)}
    said = unseen(found)
    assert said.startswith(
        "On what nobody trained on (intervals, no claims): no difference was found on a kind of "
        "question beside mixed QA (two forms, three seeds); on a language and a kind beside the 36 "
        "tasks (two forms, three seeds) one is worse than LoRA (MoE-LoRA +0."
    )
    assert said.endswith(
        "; one of these 4 intervals leaves out zero, about 0 would by chance alone."
    )
    assert "chance" not in unseen({"q2_qa": found["q2_qa"]})
    assert unseen({}) == "No study has scored what nobody trained on."


def test_own_metrics_are_better_where_they_are_higher() -> None:
    """Planted: a higher share of right answers where the loss is lower."""
    shifts = dict(lora=0.0, moe_lora=0.5, rotmole=0.0, shared=-0.5)
    found = {"q2_qa": judge(made_results(shifts, seeds=range(3), rows=200))}
    said = script("answers").by_own_metrics(found)
    assert said.startswith(
        "By the tasks' own metrics (intervals, no claims): on mixed QA (exact_match, three forms, "
        "three seeds) one is better than LoRA (MoE-LoRA with an always-on expert +0."
    )
    assert " and one is worse than LoRA (MoE-LoRA -0." in said
    assert said.endswith("two of these 3 intervals leave out zero, about 0 would by chance alone.")
    table = script("results").table(found["q2_qa"]).splitlines()
    assert table[0].endswith("| verdict | difference, exact_match |")
    assert "-0." in table[-3].split("|")[-2]


def test_regimes_without_a_gain_share_a_sentence() -> None:
    worse = judge(made_results(dict(lora=0.0, moe_lora=0.5), seeds=range(3)))
    even = judge(made_results(dict(lora=0.0, moe_lora=0.0, rotmole=0.0)))
    regimes = script("answers").regimes
    assert regimes({"q7e_down": worse, "q7g_dense": even}) == (
        "No form was better than one tuned LoRA where else we looked: on down_proj (one form, "
        "three seeds, one worse) and with dense gates around a LoRA (two forms, eight seeds)."
    )
    better = judge(made_results(dict(lora=0.0, moe_lora=-0.5), seeds=range(3)))
    said = regimes({"q7e_down": worse, "q7a_tiny": better})
    assert "With 0.3 M parameters, three seeds (intervals, no claims): one of one forms" in said
    assert "On down_proj, three seeds" in said


def test_runs_that_learn_a_language_are_paired_by_seed() -> None:
    def cell(name: str, seed: int, match: float) -> dict[str, object]:
        return {"cell": name, "seed": seed, "scores": {"de": {"exact_match": match}}}

    grown = [cell("grown-frozen", seed, 0.5 + seed / 10) for seed in range(3)]
    lora = [cell("lora-on", seed, 0.25 + seed / 10) for seed in (2, 0, 1)]
    found = script("answers").gap(grown + lora, "grown-frozen", "lora-on", ["de"])
    assert found.value == pytest.approx(0.25)
    assert found.high - found.low == pytest.approx(0, abs=1e-12)


def test_what_an_inspection_found_has_its_table_and_figure(tmp_path: Path) -> None:
    parts = {"trained": 0.5, "rotation_off": 0.7, "uniform": 0.8, "base": 3.5}
    angles = {"all": 0.3, "a": 0.2, "b": 0.4}
    made = {"processor": "a card", "commit": "abc"}
    cell = {"answers": parts, "static": {"8": 0.9, "16": 0.95}, "angles": angles, "made": made}
    plain = cell | {"answers": parts | {"rotation_off": None}, "angles": {"all": None, "a": None}}
    found = {
        "tangent/seed-0": cell,
        "tangent/seed-1": cell | {"answers": parts | {"rotation_off": 0.9}},
        "moe_lora/seed-0": plain,
    }
    text = script("results").look_inside(found, tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[-2].startswith(
        "| RotMoLE with its default gates | 2 | 0.500 | +0.300 | +0.300 | +3.000 | 90.0% | 95.0% | "
    )
    assert "0.20 to 0.40" in lines[-2]
    assert lines[-1] == "| MoE-LoRA | 1 | 0.500 |  | +0.300 | +3.000 | 90.0% | 95.0% |  |"
    assert text.endswith("processor a card, commit abc")
    assert "MoE-LoRA" in (tmp_path / "results-q4_inside.svg").read_text(encoding="utf-8")


def test_a_finished_study_has_its_table_and_its_figure(tmp_path: Path) -> None:
    """In place of what it would cost; every figure is one of the judgement."""
    judgement = judge(made_results({"lora": 0.0, "moe_lora": 0.25}))
    write_judgement(judgement, tmp_path / "q3.json")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    results = script("results")
    text = results.page(page, tmp_path, tmp_path)
    part = text.partition("<!-- q3 -->")[2].partition("<!-- end of q3 -->")[0]
    assert "Not run yet" not in part
    (line,) = [line for line in part.splitlines() if line.startswith("| moe_lora")]
    estimate = judgement.difference("moe_lora", "nll").estimate
    assert f"{estimate.value:+.4f}" in line or f"{estimate.value:+.3f}" in line
    assert "worse" in line
    assert (tmp_path / "results-q3.svg").is_file()
    assert "Not run yet" in text.partition("<!-- q6 -->")[2]


def test_a_study_with_cells_left_says_what_they_cost(tmp_path: Path) -> None:
    left = tuple(f"cells/final/shared/seed-{seed}" for seed in range(3))
    found = replace(made_results({"lora": 0.0, "moe_lora": 0.25}), missing=left)
    write_judgement(judge(found), tmp_path / "q3.json")
    results = script("results")
    (q3,) = results.QUESTIONS["q3"]
    part = results.shown(q3, tmp_path, tmp_path)
    assert "| moe_lora |" in part
    hours = 3 * q3.minutes / 60
    assert part.endswith(
        f"q3.yaml` has 3 cells left (shared), about {hours:.1f} hours of one core."
    )


def test_the_cells_of_a_study_are_counted_as_the_plan_does() -> None:
    study = {"methods": {"a": {}, "b": {}}, "seeds": [0, 1, 2]}
    assert script("results").cells(study) == 6
    tune = {"grid": {"x": [1, 2], "y": [1, 2, 3]}, "seeds": [7, 8]}
    assert script("results").cells(study | {"tune": tune}) == 2 * (6 * 2 + 3)


NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def numbers(text: str) -> list[float]:
    """The numbers of a figure but those of its writer."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return [float(number) for number in NUMBER.findall(text)]


def same(new: str, committed: Path) -> bool:
    """Whether numbers differ by under 0.01 point: another matplotlib may write a digit more."""
    mine, theirs = numbers(new), numbers(committed.read_text(encoding="utf-8"))
    return len(mine) == len(theirs) > 300 and all(
        math.isclose(a, b, abs_tol=0.01) for a, b in zip(mine, theirs, strict=True)
    )


def test_the_picture_is_what_its_script_draws(tmp_path: Path) -> None:
    script("turn").draw(tmp_path / "turn.svg")
    new = (tmp_path / "turn.svg").read_text(encoding="utf-8")
    assert same(new, PICTURES / "turn.svg"), "run `make pages`"


def test_the_figures_of_the_inspection_are_those_of_the_committed_record() -> None:
    figures = script("inspect_figures")
    page = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    names = []
    for plot in figures.drawn(figures.RECORD):
        names.append(f"inspect-{plot.name}.svg")
        assert f"](pictures/{names[-1]})" in page
        assert same(figures.standalone(plot.svg), PICTURES / names[-1]), "run `make pages`"
    assert names == [file for file in re.findall(r"\(pictures/(inspect-[^)]+)\)", page)]


def test_the_pictures_rotation_keeps_the_length() -> None:
    assert [math.hypot(*end) for end in script("turn").turned()] == pytest.approx([1, 1, 1])


LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize(
    "document",
    [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda document: document.name,
)
def test_every_link_to_a_file_leads_to_one(document: Path) -> None:
    links = LINK.findall(document.read_text(encoding="utf-8"))
    assert not [link for link in links if not (document.parent / link).exists()]
