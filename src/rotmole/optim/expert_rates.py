"""Learning rates of experts that follow how many tokens choose them."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rotmole.errors import ConfigError
from rotmole.tuner.batch.loads import LoadCount
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer

DECAY = 0.99
LOWEST, HIGHEST = 0.25, 2.0
STATE = "expert_shares"
"""Key of the running shares in the optimizer's state."""
EVEN = ("dense", "expert_choice")
"""Selections that use all experts alike."""


class _Choice(NamedTuple):
    """One router, and whose experts it chooses.

    Attributes:
        name: of the layer and adapter, by which the share is saved.
        loads: choices since the last step.
        layers: one; in a block-routed block all of the block's.
    """

    name: str
    loads: LoadCount
    layers: list[Experts]


class ExpertRates:
    """Multiply the learning rate of each expert by a factor that follows its share of choices.

        share_e  <- decay share_e + (1 - decay) choices_e / sum_j choices_j      once a step
        factor_e  = sqrt(E share_e), at least 0.25 and at most 2
        p_e      <- p_e + factor_e (the optimizer's new p_e - p_e)

    Under Adam and Muon a step is as long for an expert that few tokens choose as for one that many
    choose, though its gradient is a mean over fewer tokens and noisier. The rate of Adam goes with
    the square root of the batch, and an expert's batch is its share of the tokens. Shares start
    even, so all factors start at 1, and an expert that is used evenly keeps the rate. A step
    is linear in the learning rate, weight decay included, so this equals a rate for each expert.

    It acts on what belongs to one expert alone: its A, its B and its rotation gate; not on routers,
    the shared expert, an A that all experts share, or a map that all gates share. Choices are
    counted in the backward pass, without padding, over all micro-batches and processes. The shares
    are a part of `optimizer.state_dict()`. A step that is left out, as by a gradient scaler,
    moves nothing, and its choices count in the next.

    Args:
        optimizer: of AdamW's kind or Muon; hooks are added to it.
        model: the model that holds the experts.
        decay: of the running shares, at least 0 and below 1.

    Raises:
        ConfigError: the optimizer is SGD, whose steps follow the share already; decay is out of
            range; at a step, if A or B is sharded (FSDP).

    Source: the square root from arXiv 2205.10287, rates by experts' batches from Hunyuan-Large
    (arXiv 2411.02265); the running share and the limits are ours.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, model: nn.Module, decay: float = DECAY
    ) -> None:
        if isinstance(optimizer, torch.optim.SGD):
            raise ConfigError(
                "rates by load do not fit SGD, whose step for an expert is as long as its share of "
                "the tokens already; use an optimizer of Adam's kind or Muon"
            )
        if not 0 <= decay < 1:
            raise ConfigError(f"decay is {decay!r}; it must be at least 0 and below 1")
        self.decay = decay
        self.choices = _choices(model)
        if not self.choices:
            warnings.warn(
                "rates by load have no effect: no layer has a router that prefers experts "
                "(num_experts is 1, or selection is dense or expert_choice)",
                stacklevel=2,
            )
        self.share_E = {name: _even(layers[0]) for name, _, layers in self.choices}
        self.warned = False
        self._before: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._scale)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def factors(self) -> dict[str, Tensor]:
        """Return [E] factors of each layer with a router, by its name."""
        return {name: _factor(share_E) for name, share_E in self.share_E.items()}

    @torch.no_grad()
    def _keep(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        self._follow()
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._before = []
        for choice in self.choices:
            factor_E = _factor(self.share_E[choice.name])
            for parameter, experts in _whole(choice.layers):
                if id(parameter) in stepped and parameter.grad is not None:
                    rows = factor_E[experts].view(-1, *[1] * (parameter.dim() - 1)).to(parameter)
                    self._before.append((parameter, parameter.detach().clone(), rows))

    @torch.no_grad()
    def _scale(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        for parameter, before, rows in self._before:
            parameter.copy_(torch.lerp(before, parameter, rows))
        self._before = []

    def _follow(self) -> None:
        """Move the shares by the choices since the last step."""
        if not self.choices:
            return
        counts = [choice.loads for choice in self.choices]
        if all(count.loads_E is None for count in counts) and not self.warned:
            self.warned = True
            warnings.warn(
                "rates by load found no choices, so all factors stay as they are: choices are "
                "counted in the backward pass of a model in training mode, and not inside "
                "torch.compile",
                stacklevel=2,
            )
        shares = list(self.share_E.values())
        loads = [
            torch.zeros_like(share_E) if count.loads_E is None else count.loads_E.to(share_E)
            for count, share_E in zip(counts, shares, strict=True)
        ]
        flat = torch.cat([load_E.to(loads[0].device) for load_E in loads])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
        for count, share_E, load_E in zip(
            counts, shares, torch.split(flat, [len(load_E) for load_E in loads]), strict=True
        ):
            total = load_E.sum()
            now_E = torch.where(total > 0, load_E / total.clamp(min=1), share_E.to(load_E.device))
            share_E.lerp_(now_E.to(share_E), 1 - self.decay)
            count.loads_E = None

    def _save(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state[STATE] = {name: share_E.cpu() for name, share_E in self.share_E.items()}

    def _load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        saved = state.get(STATE, {})
        for name, share_E in self.share_E.items():
            if name in saved and saved[name].shape == share_E.shape:
                share_E.copy_(saved[name])
            else:  # a state from before rates by load
                share_E.fill_(1 / len(share_E))


def _even(experts: Experts) -> Tensor:
    number, device = experts.spec.num_experts, experts.expert_B.device
    return torch.full((number,), 1 / number, dtype=torch.float32, device=device)


def _factor(share_E: Tensor) -> Tensor:
    return (len(share_E) * share_E).sqrt().clamp(LOWEST, HIGHEST)


def _whole(layers: list[Experts]) -> list[tuple[nn.Parameter, slice]]:
    """Return the parameters with a row for each expert, and which experts these are.

    Raises:
        ConfigError: this process holds only a shard of them.
    """
    parameters = []
    for experts in layers:
        rows = experts.by_expert()
        # FSDP2 makes DTensors of them (builds without torch.distributed lack that class), FSDP1
        # takes them away
        if not rows or any(hasattr(parameter, "placements") for parameter, _ in rows):
            raise ConfigError(
                "rates by load need each expert whole, but FSDP shards them; train with DDP or in "
                "one process, or set optimizer.expert_lr_by_load: none"
            )
        parameters += rows
    return parameters


def _choices(model: nn.Module) -> list[_Choice]:
    """Return every router that prefers experts, and let it count."""
    choices: list[_Choice] = []
    leaders: dict[tuple[str, int], _Choice] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, RotMoleLayer):
            continue
        for adapter in layer.rotmole_experts:
            experts, part = layer.experts(adapter), layer.rotmole_blocks.get(adapter)
            if experts.has_router and experts.spec.selection not in EVEN:
                experts.choices = LoadCount()
                choices.append(_Choice(f"{path}.{adapter}", experts.choices, [experts]))
                if part is not None:
                    leaders[adapter, part.block] = choices[-1]
            elif part is not None and (adapter, part.block) in leaders:
                leaders[adapter, part.block].layers.append(experts)
    return choices
