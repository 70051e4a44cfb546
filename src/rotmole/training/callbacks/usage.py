"""How the experts are used while training: figures of a log line, and one warning at collapse."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.ops.routing.route import select_by
from rotmole.ops.spec import Spec
from rotmole.training.figures import SHARE
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer
from rotmole.tuner.shares import ExpertShares

logger = logging.getLogger(__name__)

COLLAPSED = 0.99
"""Share of a layer's choices that its K most chosen experts take when it has collapsed."""
PATIENCE = 3
"""Log lines in a row before a collapse is reported; a single small batch proves nothing."""


class UsageCallback(TrainerCallback):
    """Count how often the update's tokens chose each expert; padding does not count.

    Adds to each training log, over the micro-batches of the update at hand:
        experts_unused, experts_total: (layer, expert) pairs that no token chose, and all of them,
            of the layers with a router.
        largest_expert_share: the most chosen expert's share of a layer's choices, the largest of
            all layers.
        largest_expert_share_mean: the same, the mean of the layers.
        expert_share_even, expert_share_ceiling: what that share is at best, 1/E, and at most, 1/K,
            in the layer where it is largest.
        expert_share/NAME: if experts have names, the share of the routing weights that each has,
            the mean of layers and tokens; also where every token uses every expert.
    A layer whose K most chosen experts took 99 % of all choices in three log lines in a row
    is reported once, by a warning.
    """

    def __init__(self) -> None:
        self.reset()
        self.warned = False

    def reset(self) -> None:
        """Forget all counts."""
        self.chosen: dict[str, torch.Tensor] = {}
        self.top_k: dict[str, int] = {}
        self.streak: dict[str, int] = {}
        self.handles: list[Any] = []
        self.shares: ExpertShares | None = None
        self.counting = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hook the experts that choose: more than one, not all of them."""
        self.on_train_end(args, state, control)  # auto_find_batch_size begins more than once
        self.reset()
        self.shares = ExpertShares(kwargs["model"], training=True).__enter__()
        for path, layer in kwargs["model"].named_modules():
            if not isinstance(layer, RotMoleLayer):
                continue
            for adapter, experts in layer.rotmole_experts.items():
                if isinstance(experts, Experts) and _chooses(experts.spec):
                    name = f"{path}.rotmole_experts.{adapter}"
                    self.handles.append(experts.register_forward_hook(self._counter(name, layer)))

    def _counter(self, name: str, layer: RotMoleLayer) -> Any:
        def count(experts: Experts, args: Any, output: Any) -> None:
            routed = output[1] if isinstance(output, tuple) and len(output) == 2 else None
            if not (self.counting and experts.training) or routed is None:
                return
            if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
                return  # the second run of a checkpointed block
            batch, spec = layer.rotmole_stack.batch(), experts.spec
            routing = routed.routing
            if routing is None:
                routing = select_by(spec, routed.logits_TE.detach())
            chosen_TE = routing.selected_TE.detach()
            layout = batch.layout(args[2].x)
            if layout is not None and layout.tokens.mask_T is not None:
                chosen_TE = chosen_TE & layout.tokens.mask_T[:, None]
            self.top_k[name] = spec.chosen
            self.chosen[name] = self.chosen.get(name, 0) + chosen_TE.sum(0)

        return count

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the update before: a figure never spans a resume or a log interval.

        Counting takes time in every layer, so it waits for updates that will be logged.
        """
        self.chosen = {}
        every = state.logging_steps if args.logging_strategy == "steps" else 1
        first = args.logging_first_step and state.global_step == 0
        self.counting = first or (state.global_step + 1) % max(int(every), 1) == 0
        if self.shares is not None:
            self.shares.counting = self.counting
            self.shares.reset()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to a training log; warn once."""
        if logs is None or "loss" not in logs:
            return
        named = {} if self.shares is None else self.shares.shares()
        logs.update({f"{SHARE}{name}": share for name, share in named.items()})
        if not self.chosen:
            return
        counts = {name: _summed(count).tolist() for name, count in self.chosen.items()}
        logs.update(usage_logs(counts, self.top_k))
        for name, count in counts.items():
            taken = sum(sorted(count, reverse=True)[: self.top_k[name]])
            whole = sum(count)
            collapsed = whole > 0 and taken >= COLLAPSED * whole
            self.streak[name] = self.streak.get(name, 0) + 1 if collapsed else 0
        self._report(state, counts)

    def _report(self, state: TrainerState, counts: dict[str, list[int]]) -> None:
        collapsed = [name for name, length in self.streak.items() if length >= PATIENCE]
        if self.warned or not collapsed or not state.is_world_process_zero:
            return
        self.warned = True
        first = collapsed[0]
        logger.warning(
            "experts have collapsed in %d of %d layers: at update %d %d of %d experts of %s took "
            "99 %% of the tokens' choices; the others learn nothing. Raise "
            "adapter.router_aux_loss_coef (0.01 is usual), or lower the learning rate of the gate "
            "(optimizer.scaling_gate_lr)",
            len(collapsed), len(counts), state.global_step, self.top_k[first], len(counts[first]),
            first.removesuffix(".rotmole_experts.default").removeprefix("base_model.model."),
        )  # fmt: skip

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.shares is not None:
            self.shares.__exit__(None, None, None)


def _chooses(spec: Spec) -> bool:
    return spec.selection == "top_k" and spec.chosen < spec.num_experts


def usage_logs(counts: Mapping[str, list[int]], top_k: Mapping[str, int]) -> dict[str, float]:
    """Sum up how often the experts of each layer were chosen.

    Args:
        counts: layer -> choices of each expert.
        top_k: layer -> experts that a token chooses.

    Returns:
        The figures of UsageCallback.

    >>> usage_logs({"a": [4, 3, 1, 0], "b": [2, 2, 2, 2]}, {"a": 2, "b": 2})
    ... # doctest: +NORMALIZE_WHITESPACE
    {'experts_unused': 1, 'experts_total': 8, 'largest_expert_share': 0.5,
     'largest_expert_share_mean': 0.375, 'expert_share_even': 0.25, 'expert_share_ceiling': 0.5}
    """
    shares = {name: max(count) / sum(count) for name, count in counts.items() if sum(count)}
    figures: dict[str, float] = {
        "experts_unused": sum(chosen == 0 for count in counts.values() for chosen in count),
        "experts_total": sum(map(len, counts.values())),
    }
    if not shares:
        return figures
    most = max(shares, key=lambda name: shares[name])
    return figures | {
        "largest_expert_share": shares[most],
        "largest_expert_share_mean": sum(shares.values()) / len(shares),
        "expert_share_even": 1 / len(counts[most]),
        "expert_share_ceiling": 1 / top_k[most],
    }


def _summed(count: torch.Tensor) -> torch.Tensor:
    """Add up the counts of all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = count.clone()
        torch.distributed.all_reduce(count)
    return count
