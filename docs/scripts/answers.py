"""The answer of docs/results.md in ten sentences, each made from the committed figures.

A difference to LoRA is a claim where the study's judgement makes one. Other pairs, such as a
rotation and the same mixture without, have intervals and are no claims.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rotmole.comparison.judgement import BETTER, FEW, NONE, WORSE, Judgement, Measure
from rotmole.comparison.scores import HELD_OUT, OWN
from rotmole.evaluation.statistics.paired import Paired, paired
from rotmole.units import count_word

NAMES = {
    "lora": "LoRA",
    "moe_lora": "MoE-LoRA",
    "tangent": "RotMoLE with its default gates",
    "rotmole": "RotMoLE with its default gates",
    "tangent_h4": "RotMoLE with gates through four inputs",
    "cayley_h4": "Cayley gates through four inputs",
    "radar_pairs": "RadarGate's pairs",
    "offset": "`offset`",
    "scale": "`scale`",
    "shared": "MoE-LoRA with an always-on expert",
    "dense_mean_one": "a dense mixture with weights of mean one",
    "mola": "MoLA",
    "moe_lora_sum_two": "MoE-LoRA with weights that sum to two",
    "even": "a dense mixture whose gates hardly learn",
    "tangent_e1_k1": "a single expert with rotation",
    "shared_turned": "MoE-LoRA with an always-on expert that is turned",
    "slow_router": "scaling gates at a rate of 2e-4",
    "fast_router": "scaling gates at a rate of 2e-2",
    "slow_rotation": "rotation gates at a rate of 2e-4",
    "fast_rotation": "rotation gates at a rate of 2e-2",
    "balance_01": "a balance loss of 0.01",
    "balance_10": "a balance loss of 0.1",
}
ROTATIONS = ("tangent", "rotmole", "tangent_h4", "cayley_h4", "radar_pairs")
FEW_EXPERTS = {
    (1, 1): ("lora", "tangent_e1_k1", ""),
    (2, 1): ("none_e2_k1", "cayley_e2_k1", ""),
    (2, 2): ("none_e2_k2", "cayley_e2_k2", "radar_e2_k2"),
    (4, 1): ("none_e4_k1", "cayley_e4_k1", ""),
    (4, 2): ("moe_lora", "cayley_h4", "radar_pairs"),
    (8, 1): ("none_e8_k1", "cayley_e8_k1", ""),
    (8, 2): ("none_e8_k2", "cayley_e8_k2", "radar_e8_k2"),
}
"""E, K -> the methods of Q3 without rotation, with rotation gates, and with RadarGate's pairs."""
Studies = Mapping[str, Judgement]


def name_of(method: str) -> str:
    """Say a method in words."""
    return NAMES.get(method, f"`{method}`")


def difference(study: Judgement, one: str, other: str, measure: str = "nll") -> Paired | None:
    """Return the paired difference of two methods over everything, the first minus the second."""
    scores = [study.score(method, measure) for method in (one, other)]
    if None in scores:
        return None
    here, there = (score.by_seed for score in scores if score is not None)
    values = [
        value - base
        for seed, value in here.items()
        if value is not None and (base := there.get(seed)) is not None
    ]
    return paired(values) if values else None


def overall(study: Judgement, measure: str = "nll") -> list[tuple[str, Paired, str]]:
    """Return each method's difference to the baseline over everything, and its verdict."""
    return [
        (d.method, d.estimate, d.verdict)
        for d in study.differences
        if d.measure == measure and not d.task and d.estimate is not None
    ]


def written(found: Paired) -> str:
    """Write a difference with its interval."""
    if found.low is None or found.high is None:
        return f"{found.value:+.3f}"
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def direction(found: Paired, *, higher_is_better: bool = False) -> str:
    """Say what an interval decides: "better", "worse" (a higher loss), or neither."""
    lower, higher = (WORSE, BETTER) if higher_is_better else (BETTER, WORSE)
    if found.high is not None and found.high < 0:
        return lower
    return higher if found.low is not None and found.low > 0 else NONE


def verdict_of(estimate: Paired, verdict: str) -> str:
    """Return a verdict by NLL; where seeds are too few for claims, what the interval decides."""
    return direction(estimate) if verdict == FEW else verdict


def listed(parts: Sequence[str]) -> str:
    """Join with commas and an "and"."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _against(study: Judgement, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Say for each pair how the first does beside the second."""
    parts = []
    for one, other in pairs:
        found = difference(study, one, other)
        if found is not None:
            way, first, second = direction(found), name_of(one), name_of(other)
            said = f"{first} is {way} than {second}"
            if way == NONE:
                said = f"no difference was found between {first} and {second}"
            parts.append(f"{said} ({written(found)})")
    return parts


def _some(found: Sequence[tuple[str, Paired]]) -> str:
    """Write differences in parentheses: the first two of many, and how many others there are."""
    shown = [f"{name_of(method)} {written(estimate)}" for method, estimate in found]
    if len(found) <= 3:
        return f"({'; '.join(shown)})"
    values = [estimate.value for _, estimate in found]
    others = f"{count_word(len(found) - 2)} others, {min(values):+.3f} to {max(values):+.3f} in all"
    return f"({'; '.join([*shown[:2], others])})"


def against_lora(study: Judgement, where: str, *, brief: bool = False) -> str:
    """Say which methods beat the baseline, which lose to it, and which cannot be told from it.

    A study with too few seeds for claims says what its intervals decide. A brief sentence names
    the methods that beat the baseline alone.
    """
    explores = any(d.verdict == FEW for d in study.differences)
    groups: dict[str, list[tuple[str, Paired]]] = {BETTER: [], WORSE: []}
    for method, estimate, verdict in overall(study):
        groups.setdefault(verdict_of(estimate, verdict), []).append((method, estimate))
    better, worse = groups.pop(BETTER), groups.pop(WORSE)
    verbs = [("is better than", "are better than"), ("is worse than", "are worse than")]
    if not explores:
        verbs = [("beats", "beat"), ("loses to", "lose to")]
    forms = f"of {count_word(len(better) + len(worse) + sum(map(len, groups.values())))} forms"
    count = f"{count_word(len(better))} {forms}" if better else f"none {forms}"
    parts = [f"{count} {verbs[0][len(better) > 1]} one tuned {name_of(study.baseline)}"]
    parts[0] += f" {_some(better)}" if better else ""
    if worse:
        shown = "" if brief else f" {_some(worse)}"
        parts.append(f"{count_word(len(worse))} {verbs[1][len(worse) > 1]} it{shown}")
    for verdict, found in groups.items():
        shown = "" if brief else f" {_some(found)}"
        parts.append(f"{count_word(len(found))}: {verdict}{shown}")
    seeds = f"{count_word(len(study.seeds))} seeds{' (intervals, no claims)' if explores else ''}"
    return f"{where}, {seeds}: {'; '.join(parts)}."


def other_mixtures(studies: Studies) -> str:
    """Say what Q2 found; in one sentence where no interval of any study leaves out zero."""
    words = {"glue": "mixed GLUE", "qa": "mixed QA", "titles": "titles in nine languages"}
    found = {f"On {what}": studies[f"q2_{n}"] for n, what in words.items() if f"q2_{n}" in studies}
    if not found:
        return "Open: other mixtures (Q2) were not run."
    means = {
        where: [estimate for _, estimate, _ in overall(study)] for where, study in found.items()
    }
    sizes = {(len(study.seeds), len(study.methods) - 1) for study in found.values()}
    claims = any(d.verdict not in (FEW, "") for s in found.values() for d in s.differences)
    differ = any(direction(e) != NONE for each in means.values() for e in each)
    if len(sizes) > 1 or claims or differ:
        return " ".join(against_lora(study, where) for where, study in found.items())
    ((seeds, forms),) = sizes
    ranges = [
        f"{min(e.value for e in each):+.3f} to {max(e.value for e in each):+.3f}"
        for each in means.values()
    ]
    return (
        f"On {listed([where[3:] for where in found])}, {count_word(seeds)} seeds (intervals, no "
        f"claims): no difference was found between any of {count_word(forms)} forms and one tuned "
        f"LoRA (means {listed(ranges)})."
    )


def _turned(study: Judgement, measure: Measure) -> str:
    """Say what rotation adds to as many experts without it, in one measure."""
    parts = []
    for column, name in ((1, "rotation gates"), (2, "RadarGate's pairs")):
        ways: dict[str, list[tuple[str, Paired]]] = {}
        for (experts, chosen), names in FEW_EXPERTS.items():
            pair = names[column], names[0]
            found = difference(study, *pair, measure.name) if names[column] else None
            if found is not None:
                way = direction(found, higher_is_better=measure.higher_is_better)
                ways.setdefault(way, []).append((f"E = {experts}, K = {chosen}", found))
        said = [
            f"{way} at {'; '.join(f'{place} ({written(found)})' for place, found in ways[way])}"
            for way in (BETTER, WORSE)
            if way in ways
        ]
        if NONE in ways:
            values = [found.value for _, found in ways[NONE]]
            total = count_word(sum(map(len, ways.values())))
            said.append(
                f"no difference was found at {count_word(len(values))} of {total} "
                f"(means {min(values):+.3f} to {max(values):+.3f})"
            )
        if said:
            parts.append(f"for {name} {listed(said)}")
    return "; ".join(parts)


def few_experts(study: Judgement, again: Judgement | None = None) -> str:
    """Say what rotation adds where experts are few, beside as many of them without.

    Args:
        study: the judgement of q3.yaml.
        again: of the study that has the same methods' own metric; None if it was not run.
    """
    ways_of_all = [verdict_of(estimate, verdict) for _, estimate, verdict in overall(study)]
    better, worse = (ways_of_all.count(way) for way in (BETTER, WORSE))
    own = [m for m in again.measures if m.name == OWN] if again is not None else []
    by_own = ""
    if again is not None and own:
        by_own = f" By {own[0].label}, trained again: {_turned(again, own[0])}."
    return (
        f"Few experts (1 to 8, one or two a token), {count_word(len(study.seeds))} seeds, by "
        f"intervals, beside as many experts without rotation: {_turned(study, study.measures[0])}."
        f"{by_own} Of all "
        f"{len(ways_of_all)} forms {count_word(better) if better else 'none'} "
        f"{'are' if better > 1 else 'is'} better than one tuned LoRA in NLL and "
        f"{count_word(worse) if worse else 'none'} {'are' if worse > 1 else 'is'} worse."
    )


def rotation(study: Judgement) -> str:
    """Say what rotation adds to the same mixture without."""
    ways: dict[str, list[tuple[str, Paired]]] = {}
    for name in ROTATIONS:
        found = difference(study, name, "moe_lora")
        if found is not None:
            ways.setdefault(direction(found), []).append((name, found))
    words = {BETTER: "better with", WORSE: "worse with", NONE: "no difference was found for"}
    parts = [f"{words[way]} {count_word(len(v))} {_some(v)}" for way, v in ways.items()]
    return f"Rotation, beside the same mixture without at equal parameters: {'; '.join(parts)}."


def reasons(study: Judgement, inside: Mapping[str, Any] | None) -> str:
    """Say what controls, a trained adapter without its rotation, and an always-on expert do."""
    turned = "tangent" if study.score("tangent", "nll") else "rotmole"
    parts = _against(study, ((turned, "offset"), (turned, "scale")))
    text = f"Beside controls with as many parameters, {listed(parts)}"
    cells = [v for k, v in (inside or {}).items() if k.startswith(f"{turned}/")]
    if cells:
        lost = fmean(c["answers"]["rotation_off"] - c["answers"]["trained"] for c in cells)
        static = fmean(c["static"]["16"] for c in cells)
        text += (
            f"; a trained adapter leans on its rotation ({lost:+.2f} nats without, "
            f"{count_word(len(cells))} seed{'s' * (len(cells) > 1)}), and yet "
            f"{static:.0%} of what it adds is a static map of rank 16"
        )
    parts = _against(study, (("shared", "moe_lora"), ("shared", "lora")))
    return f"{'; '.join([text, *parts])}."


def gates(study: Judgement) -> str:
    """Say what the gates' own learning rates and a balance loss do to the default rotation."""
    found = [(method, estimate) for method, estimate, _ in overall(study)]
    values = [estimate.value for _, estimate in found]
    decided = {
        way: [each for each in found if direction(each[1]) == way] for way in (BETTER, WORSE)
    }
    said = [f"{count_word(len(v))} {way} {_some(v)}" for way, v in decided.items() if v]
    return (
        f"own rates of the gates and a balance loss move {name_of(study.baseline)} by "
        f"{min(values):+.3f} to {max(values):+.3f} ({count_word(len(found))} settings, "
        f"{count_word(len(study.seeds))} seeds, by intervals: {listed(said) or 'none decided'})"
    )


def rates(study: Judgement, gate_rates: Judgement | None = None) -> str:
    """Say what the learning rate does beside the choice of the method, and of the gates' alone."""
    best = {method.name: method.rate for method in study.methods}
    by_rate: dict[str, dict[float, list[float]]] = {}
    for trial in study.trials:
        if trial.nll is not None:
            by_rate.setdefault(trial.method, {}).setdefault(trial.rate, []).append(trial.nll)
    base = {rate: fmean(values) for rate, values in by_rate[study.baseline].items()}
    chosen = best[study.baseline]
    costs = [
        f"{value - base[chosen]:+.2f} at {rate:g}"
        for rate, value in sorted(base.items())
        if rate != chosen and 0.4 < rate / chosen < 2.5
    ]
    scores = [s.value for s in study.scores if s.measure == "nll" and not s.task and s.value]
    others = {rate for name, rate in best.items() if name != study.baseline}
    words = listed([f"{rate:g}" for rate in sorted(others)])
    step = _against(study, (("moe_lora_sum_two", "moe_lora"), ("dense_mean_one", "lora")))
    steps = f"; as for the size of the step, {listed(step)}" if step else ""
    steps += f"; {gates(gate_rates)}" if gate_rates else ""
    return (
        f"Learning rates, by the tuning losses: {name_of(study.baseline)}'s best is {chosen:g} "
        f"({listed(costs)}), the mixtures' {words}, and on test rows all methods at their best lie "
        f"within {max(scores) - min(scores):.3f}{steps}."
    )


UNSEEN = {
    "q1": "a language and a kind beside the 36 tasks",
    "q2_glue": "STS-B beside mixed GLUE",
    "q2_qa": "a kind of question beside mixed QA",
    "q2_qa_again": "QA's kind of question again, with new seeds",
    "q2_titles": "Polish beside titles in nine languages",
    "q3": "a language and a kind, with few experts",
}


OWN_METRICS = {
    "locale_match": "the 36 tasks",
    "q2_glue": "mixed GLUE",
    "q2_qa": "mixed QA",
    "q2_qa_again": "mixed QA again, with new seeds",
    "q2_titles_chrf": "titles in nine languages",
    "q7a_match": "the 36 tasks with 0.3 M parameters",
    "q7b_contradictions": "tasks that contradict each other",
    "q7e_down": "the 36 tasks with down_proj adapted",
}


def told_apart(studies: Studies, places: Mapping[str, str], measure: str) -> str:
    """Say which methods intervals tell from the baseline, and how many of them chance would.

    Args:
        studies: name of the study file -> its judgement.
        places: name of the study file -> where it looked, in words.
        measure: that is judged, such as HELD_OUT.

    Returns:
        The part of a sentence; "" where no study has the measure.
    """
    even, parts, decided, total = [], [], 0, 0
    for name, what in places.items():
        found = overall(studies[name], measure) if name in studies else []
        if not found:
            continue
        (judged,) = (m for m in studies[name].measures if m.name == measure)
        forms, seeds = count_word(len(found)), count_word(len(studies[name].seeds))
        where = f"{what} ({forms} forms, {seeds} seeds)"
        if measure == OWN:
            where = f"{what} ({judged.label}, {forms} forms, {seeds} seeds)"
        ways: dict[str, list[tuple[str, Paired]]] = {BETTER: [], WORSE: []}
        for method, estimate, _ in found:
            way = direction(estimate, higher_is_better=judged.higher_is_better)
            ways.setdefault(way, []).append((method, estimate))
        said = [
            f"{count_word(len(v))} {'are' if len(v) > 1 else 'is'} {way} than LoRA {_some(v)}"
            for way, v in ways.items()
            if v and way != NONE
        ]
        total += len(found)
        decided += len(ways[BETTER]) + len(ways[WORSE])
        if said:
            parts.append(f"on {where} {listed(said)}")
        else:
            even.append(where)
    if even:
        parts.insert(0, f"no difference was found on {listed(even)}")
    if decided:
        leave = f"leave{'s' * (decided == 1)} out zero"
        by_chance = f"about {0.05 * total:.0f} would by chance alone"
        parts.append(f"{count_word(decided)} of these {total} intervals {leave}, {by_chance}")
    return "; ".join(parts)


def unseen(studies: Studies) -> str:
    """Say how methods do on tasks that no cell trains on."""
    said = told_apart(studies, UNSEEN, HELD_OUT)
    if not said:
        return "No study has scored what nobody trained on."
    return f"On what nobody trained on (intervals, no claims): {said}."


def by_own_metrics(studies: Studies) -> str:
    """Say how methods do by the tasks' own metrics."""
    said = told_apart(studies, OWN_METRICS, OWN)
    if not said:
        return "No study was judged by its tasks' own metrics."
    return f"By the tasks' own metrics (intervals, no claims): {said}."


OLD = ("de", "fr", "es")


def kept(cells: Sequence[Mapping[str, Any]], name: str, languages: Sequence[str]) -> list[float]:
    """Return a run's exact match on some languages, one value a seed, in order of the seeds."""
    rows = sorted((cell for cell in cells if cell["cell"] == name), key=lambda cell: cell["seed"])
    return [fmean(cell["scores"][each]["exact_match"] for each in languages) for cell in rows]


def gap(
    cells: Sequence[Mapping[str, Any]], name: str, other: str, languages: Sequence[str]
) -> Paired:
    """Return the difference of two runs in exact match, paired by seed."""
    pairs = zip(kept(cells, name, languages), kept(cells, other, languages), strict=True)
    return paired([one - two for one, two in pairs])


def forgetting(cells: Sequence[Mapping[str, Any]]) -> str:
    """Say what is lost of the first languages when another is learnt."""

    def old(name: str) -> str:
        return f"{fmean(kept(cells, name, OLD)):.2f}"

    seeds = count_word(len(kept(cells, "lora", OLD)))
    more = written(gap(cells, "grown-frozen", "lora-on", OLD))
    return (
        f"Adding a language (exact match on the three old ones, {seeds} seeds): a grown mixture "
        f"with frozen old experts goes from {old('mixture')} to {old('grown-frozen')}, one LoRA "
        f"that is trained on from {old('lora')} to {old('lora-on')} (the mixture keeps {more} "
        f"more), and one LoRA on all four together has {old('joint-lora')}."
    )


def answers(
    studies: Studies, inside: Mapping[str, Any] | None, grown: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return the ten sentences; a question without its study says that it is open.

    Args:
        studies: name of the study file -> its judgement.
        inside: of experiments/study/q4_inside.py; None if it was not run.
        grown: the cells of experiments/grow.
    """
    q1 = studies.get("q1")
    if q1 is None:
        first = ["Open: Q1 was not run, so nothing is known of mixtures, rotations and controls."]
    else:
        where = "On 36 tasks (six kinds in six languages) at equal parameters"
        first = [
            against_lora(q1, where), rotation(q1), reasons(q1, inside),
            by_own_metrics(studies), rates(q1, studies.get("q4_gates")), unseen(studies),
        ]  # fmt: skip
    few = "Open: whether rotation pays where experts are few (Q3) was not run."
    if "q3" in studies:
        few = few_experts(studies["q3"], studies.get("locale_match"))
    return [*first, other_mixtures(studies), few, forgetting(grown), regimes(studies)]


def regimes(studies: Studies) -> str:
    """Say where else a mixture was looked for that wins (Q6, Q7), and what came of it."""
    found = {name: studies[name] for name in WHERE if name in studies}
    if not found:
        return "Open: longer training (Q6) and other regimes (Q7) were not run."
    ways = {
        name: [verdict_of(estimate, verdict) for _, estimate, verdict in overall(study)]
        for name, study in found.items()
    }
    if any(BETTER in each for each in ways.values()):
        return " ".join(
            against_lora(study, WHERE[name], brief=True) for name, study in found.items()
        )
    parts = []
    for name, study in found.items():
        worse = ways[name].count(WORSE)
        several = "s" * (len(ways[name]) > 1)
        forms = f"{count_word(len(ways[name]))} form{several}, {count_word(len(study.seeds))} seeds"
        where = WHERE[name][0].lower() + WHERE[name][1:]
        parts.append(f"{where} ({forms}{f', {count_word(worse)} worse' if worse else ''})")
    return f"No form was better than one tuned LoRA where else we looked: {listed(parts)}."


WHERE = {
    "q6_length": "With four times the updates",
    "q7a_tiny": "With 0.3 M parameters",
    "q7b_contradictions": "On tasks that contradict each other",
    "q7e_down": "On down_proj",
    "q7g_dense": "With dense gates around a LoRA",
    "q7h_always_on": "With rotation where every token meets it",
}
