"""How the experts are used while training: figures of a log line, and one warning at collapse."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rotmole.recording.log import ALL, RoutingLog
from rotmole.recording.record import Recorder
from rotmole.recording.usage import (
    SHARE,
    chooses,
    collapsed_layers,
    named_shares,
    usage_figures,
)
from rotmole.recording.watch import active_adapters, watch

logger = logging.getLogger(__name__)

PATIENCE = 3
"""Log lines in a row before a collapse is reported; a single small batch proves nothing."""


class UsageCallback(TrainerCallback):
    """Record what the update's tokens did in the first active adapter; padding does not count.

    Adds the figures of `rotmole.recording.usage.usage_figures` to each training log, over the
    micro-batches of the update at hand, and, if experts have names, expert_share/NAME: the share of
    the routing weights that each has, the mean of layers and tokens.
    A layer whose K most chosen experts took 99 % of all choices in three log lines in a row
    is reported once, by a warning.
    """

    def __init__(self) -> None:
        self.warned = False
        self.watching = ExitStack()
        self._begin(None)

    def _begin(self, model: Any) -> None:
        self.streak: dict[str, int] = {}
        self.log = RoutingLog(task=ALL)
        self.recorder = Recorder(self.log, angles=(), planes=False, training=True)
        config = model.active_peft_config if isinstance(model, PeftModel) else None
        self.names: list[str] = getattr(config, "expert_names", None) or []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the adapter that is trained."""
        self.on_train_end(args, state, control)  # auto_find_batch_size begins more than once
        model = kwargs["model"]
        self._begin(model)
        for adapter in active_adapters(model)[:1]:
            self.log.adapter = adapter
            self.watching.enter_context(watch(model, adapter, self.recorder.observe))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the update before: a figure never spans a resume or a log interval.

        Recording takes time in every layer, so it waits for updates that will be logged.
        """
        self.log.clear()
        every = state.logging_steps if args.logging_strategy == "steps" else 1
        first = args.logging_first_step and state.global_step == 0
        self.recorder.counting = first or (state.global_step + 1) % max(int(every), 1) == 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to a training log; warn once."""
        if logs is None or "loss" not in logs or not self.log.layers:
            return
        total = self.log.over_processes()
        if self.names:
            shares = named_shares(total, self.names)
            logs.update({f"{SHARE}{name}": share for name, share in shares.items()})
        logs.update(usage_figures(total.layers))
        collapsed = collapsed_layers(total.layers)
        self.streak = {path: self.streak.get(path, 0) + 1 for path in collapsed}
        self._report(state, total)

    def _report(self, state: TrainerState, log: RoutingLog) -> None:
        collapsed = [path for path, length in self.streak.items() if length >= PATIENCE]
        if self.warned or not collapsed or not state.is_world_process_zero:
            return
        self.warned = True
        first = log.layers[collapsed[0]]
        choosing = sum(map(chooses, log.layers.values()))
        logger.warning(
            "experts have collapsed in %d of %d layers: at update %d %d of %d experts of %s took "
            "99 %% of the tokens' choices; the others learn nothing. Raise "
            "adapter.router_aux_loss_coef (0.01 is usual), or lower the learning rate of the gate "
            "(optimizer.scaling_gate_lr)",
            len(collapsed), choosing, state.global_step, first.top_k, first.experts, collapsed[0],
        )  # fmt: skip

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks away."""
        self.watching.close()
