"""Notices: settings that are right but have no effect with the others."""

from __future__ import annotations

from collections.abc import Iterator

from rotmole.ops.rotation.table import ROTATIONS
from rotmole.ops.routing.routers import ROUTERS
from rotmole.ops.routing.selection import SELECTIONS
from rotmole.tuner.settings.settings import Settings


def notices(settings: Settings) -> Iterator[str]:
    """Yield one sentence for each setting that cannot do what its name says.

    Args:
        settings: settings without problems.
    """
    idle = _idle_in_router(settings) | _idle_in_losses(settings) | _idle_in_experts(settings)
    for name, is_idle in idle.items():
        if is_idle:
            yield f"{name}={getattr(settings, name)!r} has no effect with the other settings"
    yield from _weak(settings)


def _idle_in_router(s: Settings) -> dict[str, bool]:
    router, selection, routed = ROUTERS[s.router], SELECTIONS[s.selection], s.is_routed
    learned = routed and router.weight == "learned"
    plain_dense = s.selection == "dense" and s.scoring == "softmax"
    normalises = learned and selection.normalises and not plain_dense
    return {
        "router": s.router != "linear" and not routed,
        "scoring": s.scoring != "softmax" and not learned,
        "norm_topk_prob": not s.norm_topk_prob and not normalises,
        "top_p": s.top_p != Settings.top_p and not (routed and selection.name == "top_p"),
        "top_k_pattern": bool(s.top_k_pattern) and s.selection not in ("top_k", "expert_choice"),
        "router_dim": s.router_dim is not None
        and not (routed and (router.hidden or router.factors)),
        "router_temperature": s.router_temperature is not None and not learned,
        "router_jitter": s.router_jitter > 0 and not (routed and router.reads != "ids"),
        "router_seed": s.router_seed != 0 and not (routed and router.reads == "ids"),
        "router_bias_rate": s.router_bias_rate > 0 and not routed,
        "router_scope": s.router_scope == "block" and not routed,
        "dispatch": s.dispatch == "grouped" and s.router_scope == "block",
    }


def _idle_in_losses(s: Settings) -> dict[str, bool]:
    learned = s.is_routed and ROUTERS[s.router].weight == "learned"
    off = s.router_task_loss_coef == 0
    return {
        "router_aux_loss_coef": s.router_aux_loss_coef > 0 and not learned,
        "router_z_loss_coef": s.router_z_loss_coef > 0 and not learned,
        "router_task_loss_coef": not off and not s.is_routed,
        "router_task_offset": off and s.router_task_offset != Settings.router_task_offset,
        "router_task_groups": off and s.router_task_groups != Settings.router_task_groups,
        "router_sqrt_gate": s.router_sqrt_gate and not s.is_routed,
    }


def _idle_in_experts(s: Settings) -> dict[str, bool]:
    shared = s.shared_expert_r > 0
    rotations = {s.rotation, s.shared_expert_rotation} if shared else {s.rotation}
    return {
        "share_A": s.share_A and not s.is_routed,
        "routed_scaling_factor": s.routed_scaling_factor != 1 and not s.is_routed,
        "freeze_old": bool(s.freeze_old) and not s.experts_added,
        "use_rslora": s.use_rslora and s.goat_eta is not None,
        "alpha_pattern": bool(s.alpha_pattern) and s.goat_eta is not None,
        "rotation_dim": s.rotation_dim is not None
        and not any(ROTATIONS[name].linear_gates for name in rotations),
        "rotation_planes": s.rotation_planes is not None and "givens" not in rotations,
        "radar_rank": s.radar_rank is not None and not rotations & {"radar", "radar_pairs"},
        "radar_normalize": not s.radar_normalize and "radar" not in rotations,
        "shared_expert_alpha": s.shared_expert_alpha is not None and not shared,
        "shared_expert_rotation": s.shared_expert_rotation != "none" and not shared,
        "shared_expert_gate": s.shared_expert_gate and not shared,
    }


def _weak(s: Settings) -> Iterator[str]:
    """Yield what has an effect, but not the one that is expected of it."""
    learned = s.is_routed and ROUTERS[s.router].weight == "learned"
    always = learned and s.selection == "top_k" and s.top_k == 1 and s.norm_topk_prob
    if always and not s.experts_added:  # added experts share with those before
        yield (
            "top_k=1 with norm_topk_prob=True gives the selected expert the constant weight 1, so "
            "the scaling gate cannot learn; set norm_topk_prob=False (as Switch does) or top_k >= 2"
        )
    if s.rotation == "radar_pairs" and (s.top_k == 1 or not s.is_routed):
        yield "rotation='radar_pairs' has no effect with one selected expert: there are no pairs"
    if s.shared_expert_r > 0 and s.shared_expert_rotation == "radar_pairs":
        yield "shared_expert_rotation='radar_pairs' has no effect: a single expert has no pairs"
    if s.router_scope == "block" and s.compute_dtype == "input":
        yield (
            "compute_dtype='input' acts only on modules outside of feed-forward blocks, because "
            "router_scope is 'block'"
        )
