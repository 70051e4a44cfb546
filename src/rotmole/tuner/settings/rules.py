"""Rules between settings: combinations of right values that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator

from rotmole.ops.mixture.fused import can_compile, can_fuse
from rotmole.ops.rotation.table import ROTATIONS, Rotation
from rotmole.ops.routing.routers import ROUTERS
from rotmole.ops.routing.selection import SELECTIONS
from rotmole.tuner.settings.ranges import entries_of
from rotmole.tuner.settings.settings import Settings, range_problems


def setting_problems(settings: Settings, task_type: object = None) -> list[str]:
    """Check settings one by one and against each other.

    Args:
        settings: any values; a rule is checked only if the settings it needs are right.
        task_type: PEFT's, such as "CAUSAL_LM".

    Returns:
        One sentence per problem.
    """
    problems = range_problems(settings)
    wrong = frozenset(problems)
    sentences = [sentence for group in problems.values() for sentence in group]
    for rules in (_count_rules, _name_rules, _rotation_rules, _shared_rules, _module_rules):
        sentences += rules(settings, wrong)
    for rules in (
        _start_rules,
        _sharing_rules,
        _dispatch_rules,
        _kernel_rules,
        _router_rules,
        _task_rules,
        _sqrt_gate_rules,
    ):
        sentences += rules(settings, wrong)
    return [
        *sentences,
        *_block_rules(settings, wrong),
        *_growth_rules(settings, wrong),
        *_causal_rules(settings, wrong, task_type),
    ]


Names = frozenset[str]


def _growth_rules(s: Settings, wrong: Names) -> Iterator[str]:
    if wrong & {"experts_added", "freeze_old", "num_experts", "num_experts_pattern"}:
        return
    added = sum(s.experts_added)
    counts = {s.num_experts, *(count for _, count in entries_of(s.num_experts_pattern))}
    if added and min(counts) <= added:
        yield (
            f"experts_added is {list(s.experts_added)!r} but a module has {min(counts)} experts; "
            "the added ones are among them, and the mixture had at least one before"
        )
    if added and s.router_scope == "block":
        yield (
            "experts_added is set but router_scope is 'block', which weights whole feed-forward "
            "blocks: weights that must sum to one leave none for new experts without changing the "
            "old ones'; a mixture with router_scope block cannot grow"
        )


def _count_rules(s: Settings, wrong: Names) -> Iterator[str]:
    if wrong & {"top_k", "num_experts", "num_experts_pattern"} or s.num_experts_pattern:
        return
    assert s.top_k is not None
    if s.top_k > s.num_experts:
        yield (
            f"top_k is {s.top_k} but num_experts is {s.num_experts}; "
            "a token cannot use more experts than there are, so top_k <= num_experts"
        )


def _name_rules(s: Settings, wrong: Names) -> Iterator[str]:
    if wrong & {"expert_names", "num_experts", "num_experts_pattern"} or s.expert_names is None:
        return
    if s.num_experts_pattern:
        yield "expert_names is set but num_experts_pattern too; experts of all layers share names"
    elif len(s.expert_names) != s.num_experts:
        yield (
            f"expert_names has {len(s.expert_names)} names but num_experts is {s.num_experts}; "
            "give each expert one name"
        )


def _rotation_rules(s: Settings, wrong: Names) -> Iterator[str]:
    if "rotation" in wrong:
        return
    row = ROTATIONS[s.rotation]
    if not wrong & {"r", "rank_pattern", "rotation_planes"}:
        yield from _rank_rules(row, "r", s.r, s.rotation_planes)
        for pattern, rank in s.rank_pattern.items():
            yield from _rank_rules(row, f"rank_pattern[{pattern!r}]", rank, s.rotation_planes)
    if not wrong & {"rotation_input", "rotation_dim"}:
        yield from _input_rules(s, row)
    if s.rotation_metric == "output" and not row.metric:
        able = ", ".join(name for name, other in ROTATIONS.items() if other.metric)
        yield f"rotation_metric is 'output' but rotation is {row.name!r}; only {able} have it"


def _shared_rules(s: Settings, wrong: Names) -> Iterator[str]:
    """Yield why there cannot be such a shared expert."""
    if wrong & {"shared_expert_r", "shared_expert_rotation"} or s.shared_expert_r == 0:
        return
    row = ROTATIONS[s.shared_expert_rotation]
    if "rotation_planes" not in wrong:
        planes = s.rotation_planes if row.name == "givens" else None
        yield from _rank_rules(row, "shared_expert_r", s.shared_expert_r, planes)
    if row.linear_gates and s.rotation_input == "router":
        yield (
            f"rotation_input is 'router' but shared_expert_rotation is {row.name!r}; the shared "
            "expert has no router, so set shared_expert_rotation: none"
        )
    if row.linear_gates and s.rotation_input == "z" and not row.input_z:
        able = ", ".join(name for name, other in ROTATIONS.items() if other.input_z)
        yield (
            f"rotation_input is 'z' but shared_expert_rotation is {row.name!r}; only {able} can "
            "read z"
        )
    if s.router_scope == "block":
        yield (
            f"shared_expert_r is {s.shared_expert_r} but router_scope is 'block', where an expert "
            "is a whole feed-forward block behind whose activation no other can be added; set "
            "shared_expert_r: 0, or router_scope: layer"
        )


def _input_rules(s: Settings, row: Rotation) -> Iterator[str]:
    """Yield why a rotation's gates cannot read what they are to read."""
    if s.rotation_input == "z" and not row.input_z:
        able = ", ".join(name for name, other in ROTATIONS.items() if other.input_z)
        yield f"rotation_input is 'z' but rotation is {row.name!r}; only {able} can read z"
    if s.rotation_input != "x" and s.rotation_dim is not None:
        yield (
            f"rotation_dim is {s.rotation_dim} but rotation_input is {s.rotation_input!r}; "
            "rotation_dim says through how many numbers gates read x, so leave one of them out"
        )
    if s.rotation_input != "router":
        return
    if not row.linear_gates:
        able = ", ".join(name for name, other in ROTATIONS.items() if other.linear_gates)
        yield (
            f"rotation_input is 'router' but rotation is {row.name!r}; only {able} can read the "
            "router's logits"
        )
    learned = s.router in ROUTERS and ROUTERS[s.router].weight == "learned"
    counts = {s.num_experts, *(count for _, count in entries_of(s.num_experts_pattern))}
    if not learned or 1 in counts or s.router_scope == "block":
        yield (
            "rotation_input is 'router', which needs a learned router in every layer "
            f"(here: router {s.router!r}, num_experts {sorted(counts, key=str)}, router_scope "
            f"{s.router_scope!r})"
        )


def _rank_rules(row: Rotation, name: str, rank: int, planes: int | None) -> Iterator[str]:
    if rank < row.min_rank:
        yield f"rotation {row.name!r} needs a rank of at least {row.min_rank}; {name} is {rank}"
    if row.max_rank is not None and rank > row.max_rank:
        yield f"rotation {row.name!r} needs a rank of at most {row.max_rank}; {name} is {rank}"
    if row.even_rank and rank % 2:
        yield f"rotation {row.name!r} pairs coordinates and needs an even rank: {name}={rank}"
    if planes is not None and planes > rank // 2:
        yield f"rotation_planes is {planes}; {name}={rank} has {rank // 2} pairs"


def _module_rules(s: Settings, wrong: Names) -> Iterator[str]:
    """Yield the rules that PEFT's LoRA has too."""
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(s.target_modules, str) and getattr(s, name) is not None:
            yield f"{name} cannot be used when target_modules is a regular expression (a string)"
    if s.layers_pattern and s.layers_to_transform is None:
        yield "layers_pattern is set, so layers_to_transform must be set as well"


def _start_rules(s: Settings, wrong: Names) -> Iterator[str]:
    if "A_density" not in wrong and s.A_density < 1:
        if s.frozen == "none":
            yield (
                f"A_density is {s.A_density!r} but frozen is 'none'; the first update would fill "
                "the zeros of A, so set frozen: A"
            )
        if s.init_weights == "svd":
            yield f"A_density is {s.A_density!r} but init_weights is 'svd', whose A has no zeros"
    if s.init_weights == "svd" and s.router_scope == "block":
        yield (
            "init_weights is 'svd' but router_scope is 'block', which cannot subtract what the "
            "experts add at the start; choose router_scope layer or another init_weights"
        )


def _sharing_rules(s: Settings, wrong: Names) -> Iterator[str]:
    if s.share_A is True and s.init_weights == "svd":
        yield "share_A is True but init_weights is 'svd', which gives each expert a different A"
    if s.share_A is True and s.router == "magnitude":
        yield "share_A is True but router is 'magnitude'; all experts would have one score, |A x|"


def _dispatch_rules(s: Settings, wrong: Names) -> Iterator[str]:
    if s.dispatch != "grouped" or "rotation" in wrong:
        return
    fits = can_fuse(s.rotation, s.rotation_metric) and s.selection == "top_k"
    fits = fits and s.rotation_input != "z"
    if not fits or s.share_A or s.router_sqrt_gate:
        yield (
            "dispatch is 'grouped', which needs selection top_k and a rotation of each expert by "
            "itself in rank space, without share_A, router_sqrt_gate and rotation_input z; use "
            "dispatch auto"
        )


def _kernel_rules(s: Settings, wrong: Names) -> Iterator[str]:
    if s.kernels != "compiled" or wrong & {"rotation", "shared_expert_rotation", "dispatch"}:
        return
    rotations = {s.rotation, s.shared_expert_rotation if s.shared_expert_r else "none"}
    able = all(can_compile(name) for name in rotations) and s.rotation_metric == "rank"
    if not able or s.router_sqrt_gate or s.dispatch == "grouped" or s.router_scope == "block":
        yield (
            "kernels is 'compiled', which needs rotations none, tangent, plane or givens, without "
            "rotation_metric output, router_sqrt_gate, dispatch grouped and router_scope block"
        )


def _router_rules(s: Settings, wrong: Names) -> Iterator[str]:
    if "selection" in wrong:
        return
    row = SELECTIONS[s.selection]
    if "scoring" not in wrong and s.scoring not in row.scorings:
        yield (
            f"scoring is {s.scoring!r} but selection is {row.name!r}; that selection needs "
            "probabilities that sum to one, so set scoring: softmax, or selection: top_k or dense"
        )
    biased = "router_bias_rate" not in wrong and s.router_bias_rate > 0
    if "router" not in wrong and ROUTERS[s.router].weight != "learned" and row.name != "top_k":
        yield (
            f"router is {s.router!r} but selection is {row.name!r}; its scores order the experts "
            "but give them no weights, so set selection: top_k"
        )
    if biased and s.router == "hash":
        yield (
            f"router_bias_rate is {s.router_bias_rate} but router is 'hash'; a token's "
            "experts are fixed by its id, so set router_bias_rate: 0"
        )
    if biased and row.name != "top_k":
        yield (
            f"router_bias_rate is {s.router_bias_rate} but selection is {row.name!r}; the "
            "bias changes which K experts are selected, so set selection: top_k"
        )


def _task_rules(s: Settings, wrong: Names) -> Iterator[str]:
    read = {"router_task_loss_coef", "router_task_groups", "num_experts", "num_experts_pattern"}
    if wrong & read or not s.router_task_loss_coef:
        return
    groups = s.router_task_groups
    for count in {s.num_experts, *(count for _, count in entries_of(s.num_experts_pattern))}:
        if 1 < count < groups:
            yield (
                f"router_task_groups is {groups} but a module has {count} experts; each group "
                "needs an expert of its own, so router_task_groups <= num_experts"
            )


def _sqrt_gate_rules(s: Settings, wrong: Names) -> Iterator[str]:
    if s.router_sqrt_gate is not True:
        return
    if _mixes_outputs(s):
        yield (
            f"router_sqrt_gate is True but rotation is {s.rotation!r}, which mixes the "
            "experts' outputs before they are weighted; choose another rotation"
        )
    if s.router_scope == "block":
        yield "router_scope is 'block'; router_sqrt_gate is defined for single layers only"


def _block_rules(s: Settings, wrong: Names) -> Iterator[str]:
    """Yield why experts that are whole feed-forward blocks cannot be mixed that way."""
    if s.router_scope != "block":
        return
    constant = s.selection == "dense" and s.scoring == "softmax"
    sums_to_one = s.selection in ("top_k", "dense", "top_p") and s.router != "magnitude"
    if not sums_to_one or not (s.norm_topk_prob or constant):
        yield (
            "router_scope is 'block', which weights whole feed-forward blocks, so a token's "
            "weights must sum to one; that needs selection top_k, dense or top_p with "
            f"norm_topk_prob (here: selection {s.selection!r}, norm_topk_prob "
            f"{s.norm_topk_prob!r}, router {s.router!r})"
        )
    if _mixes_outputs(s):
        yield (
            f"router_scope is 'block' but rotation is {s.rotation!r}, in which the experts' "
            "outputs of one layer rotate each other; choose another rotation"
        )


def _mixes_outputs(s: Settings) -> bool:
    return s.rotation in ("radar", "radar_pairs")


def _causal_rules(s: Settings, wrong: Names, task_type: object) -> Iterator[str]:
    if "selection" in wrong or getattr(task_type, "value", task_type) != "CAUSAL_LM":
        return
    if SELECTIONS[s.selection].sequences:
        yield (
            f"selection is {s.selection!r} but task_type is 'CAUSAL_LM'; experts would choose "
            "among tokens that are not written yet, so training and generation would differ: use "
            "top_k"
        )
