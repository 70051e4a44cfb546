"""Let a balance loss act on the routers wherever the model is trained.

A loss added to `outputs.loss` is lost under reentrant checkpointing, in trainers that compute their
own loss, and is counted once per process. Here an identity function on the layer's output adds
the loss's gradient in the backward pass, which every trainer runs once per micro-batch. The price:
the loss is not part of the reported loss (read it with `BalanceState.pop`), and with gradient
accumulation or several processes somebody must say what share of the step a micro-batch is
(`BalanceState.loss_scale`, set by rotmole.training's trainer, for other trainers by its callback).

Three limits. A second derivative through the output would meet the function again and add the
gradient twice, so with a balance loss on PyTorch refuses one (create_graph=True, then backward).
Keys and values of cross-attention read the encoder's tokens but belong to the decoder's
stack, so the encoder's padding counts there. With gradient checkpointing a layer reads the mask
again in the backward pass, so there each forward pass needs its backward pass before the next
(router "hash" and selection "expert_choice" read token ids and mask in the same way).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rotmole.ops.routing.balance import balance_gradient, load_balance_loss, router_z_loss
from rotmole.ops.routing.plain import Routed, Routing
from rotmole.ops.routing.task_balance import task_balance_loss
from rotmole.tuner.batch.tasks import tasks_for


@dataclass(eq=False)
class BalanceState:
    """What the layers of one stack (a model, an encoder, a decoder) share during a step.

    Attributes:
        mask: [N, S] attention mask of the batch at hand, None where there is none.
        ids: [N, S] token ids of the batch at hand, likewise.
        loss_scale: multiplies the losses' gradient, the loss scale of fp16 training included. As
            processes average their gradients, it is exact at tokens of the micro-batch / (tokens
            of the step in all processes / processes), padding not counted; with equal
            micro-batches that is 1 / micro-batches of the step.
        tasks: [N] group of each sequence's task, None where the batch does not say.
        checked_groups: below which number all of `tasks` are known to lie, 0 if they were not
            looked at.
        wants_tasks: whether the localised loss is on, so that `pop` reports it.
        managed: True when somebody sets loss_scale at each step; silences the warning about it.
    """

    mask: Tensor | None = None
    ids: Tensor | None = None
    tasks: Tensor | None = None
    checked_groups: int = 0
    wants_tasks: bool = False
    warned_of_tasks: bool = False
    warned_of_bias: bool = False
    loss_scale: float | Tensor = 1.0
    managed: bool = False
    warned: bool = False
    count: int = 0
    sums: Tensor | None = None

    def pop(self, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float] | None:
        """Return the mean losses over the tokens since the last call, and forget them.

        Args:
            total: sums a tensor over processes, each of which then calls this; None keeps to one.

        Returns:
            {"router_aux_loss": 1 when balanced, "router_z_loss": ...} and, where it is on,
            "router_task_loss"; None if none ran.
        """
        if self.sums is None:
            return None
        sums = self.sums if total is None else total(self.sums)
        balance, z, task, tokens = sums.tolist()
        self.count, self.sums = 0, None
        tokens = max(tokens, 1)
        known = {"router_aux_loss": balance / tokens, "router_z_loss": z / tokens}
        return known | ({"router_task_loss": task / tokens} if self.wants_tasks else {})

    def record(self, terms: Tensor) -> None:
        """Add one layer's [balance, z and task loss, each times tokens; tokens] for `pop`."""
        self.count += 1
        self.sums = terms if self.sums is None else self.sums + terms.to(self.sums.device)

    def valid_tokens(self, x: Tensor) -> Tensor | None:
        """Return the mask if it belongs to an input of x's shape, else None."""
        if self.mask is None or self.mask.shape != x.shape[:-1]:
            return None
        return self.mask

    def warn_of_accumulation(self, router: Tensor) -> None:
        """Warn once when a gradient is already there and nobody said how many will come."""
        if self.managed or self.warned or router.grad is None or not bool(router.grad.any()):
            return
        self.warned = True
        warnings.warn(
            "gradients are accumulated with a balance loss on, and its weight does not follow: set "
            "state.loss_scale = 1 / steps and state.managed = True for state in "
            "rotmole.balance_states(model), or add rotmole.training.callbacks.BalanceCallback()",
            stacklevel=2,
        )


@dataclass(frozen=True)
class BalanceSettings:
    """Weights of the losses in one layer, already divided by the number of adapted layers."""

    balance: float = 0.0
    z: float = 0.0
    scope: str = "sequence"
    task: float = 0.0
    task_offset: float = 0.0
    task_groups: int = 1
    witness: bool = False  # one layer of a stack watches for unmanaged accumulation

    @property
    def acts(self) -> bool:
        """Whether any loss is on."""
        return bool(self.balance or self.z or self.task)


@dataclass(frozen=True)
class _Pass:
    """One forward pass of one layer, as its losses see it.

    Attributes:
        state, settings: of the stack and of the layer.
        sequences: N rows of S tokens whose statistics are apart; 1 where all are together.
        mask_T: [T] tokens that count, None for all.
        group_N: [N] task of each row, None where it does not matter.
        witness: the router, in the layer that watches for unmanaged accumulation.
    """

    state: BalanceState
    settings: BalanceSettings
    sequences: int
    mask_T: Tensor | None
    group_N: Tensor | None
    witness: Tensor | None

    def rows(self, tokens: int, rows: int, device: torch.device) -> Tensor:
        """Return [T], which of N rows each token is in."""
        each = torch.arange(rows, device=device)
        return each.repeat_interleave(tokens // max(rows, 1))

    def loss(self, logits_TE: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the losses, and what `record` takes, by autograd."""
        settings, mask_T, tokens = self.settings, self.mask_T, len(logits_TE)
        balance = load_balance_loss(
            routing.probability_TE,
            routing.selected_TE,
            sequence_T=self.rows(tokens, self.sequences, logits_TE.device),
            sequences=self.sequences,
            mask_T=mask_T,
        )
        z = router_z_loss(logits_TE, mask_T)
        loss = settings.balance * balance + settings.z * z
        task = torch.zeros_like(loss)
        if self.group_N is not None:
            task = task_balance_loss(
                routing.weight_TE,
                self.rows(tokens, len(self.group_N), logits_TE.device),
                self.group_N,
                groups=settings.task_groups,
                offset=settings.task_offset,
                mask_T=mask_T,
            )
            loss = loss + settings.task * task
        count = balance.new_tensor(tokens) if mask_T is None else mask_T.sum().to(balance)
        return loss, self.terms(balance, z, task, count)

    def terms(self, balance: Tensor, z: Tensor, task: Tensor, tokens: Tensor) -> Tensor:
        """Return what `BalanceState.record` takes."""
        each = torch.stack([balance, z, task, torch.ones_like(balance)])
        return each.detach() * tokens

    def record(self, terms: Tensor) -> None:
        """Note that the backward pass came by."""
        self.state.record(terms)
        if self.witness is not None:
            self.state.warn_of_accumulation(self.witness)


class _ActByHand(torch.autograd.Function):
    """The identity on `output`; in backward, a plain router's logits receive the gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, logits_TE: Tensor, index_KT: Tensor | None, step: _Pass
    ) -> Tensor:
        ctx.save_for_backward(logits_TE, index_KT)
        ctx.step, ctx.scale = step, step.state.loss_scale
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (logits_TE, index_KT), step = ctx.saved_tensors, ctx.step
        found = balance_gradient(
            logits_TE.mT,
            index_KT,
            sequences=step.sequences,
            balance=step.settings.balance,
            z=step.settings.z,
            mask_T=step.mask_T,
        )
        step.record(step.terms(found.balance, found.z, torch.zeros_like(found.z), found.tokens))
        return grads[0], found.logits_ET.mT * ctx.scale, None, None


class _ActByAutograd(torch.autograd.Function):
    """The identity on `output`; in backward, `loss` receives the gradient `scale`."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, loss: Tensor, scale: float | Tensor, terms: Tensor, step: Any
    ) -> Tensor:
        ctx.scale, ctx.terms, ctx.step, ctx.dtype = scale, terms, step, loss.dtype
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.step is not None:
            ctx.step.record(ctx.terms)
        scale = torch.as_tensor(ctx.scale, dtype=ctx.dtype, device=grads[0].device)
        return grads[0], scale, None, None, None


def add_balance(
    output: Tensor,
    x: Tensor,
    routed: Routed,
    state: BalanceState,
    settings: BalanceSettings,
    route: Callable[[Tensor], Routing],
    router: Tensor,
) -> Tensor:
    """Return `output`, made so that its backward pass adds the gradient of the balance losses.

    Args:
        output: the layer's addition, any shape.
        x: [..., D] layer input; with three axes or more the first numbers the sequences.
        routed: what the router said of the T tokens of x.
        state: mask, scale and record of the stack.
        settings: weights and scope.
        route: makes the routing of logits where `routed` does not hold it.
        router: the router's parameter.

    Returns:
        A tensor equal to output.
    """
    tracing = torch.compiler.is_compiling()  # a record kept in an attribute does not compile
    mask = state.valid_tokens(x)
    step = _Pass(
        state,
        settings,
        sequences=x.shape[0] if settings.scope == "sequence" and x.dim() >= 3 else 1,
        mask_T=None if mask is None else mask.reshape(-1).to(x.device),
        group_N=tasks_for(state, x, settings.task_groups) if settings.task else None,
        witness=router if settings.witness else None,
    )
    logits_TE, routing, index_KT = routed
    if routing is None and step.group_N is None and not tracing:
        return _ActByHand.apply(output, logits_TE, index_KT, step)  # type: ignore[no-any-return, no-untyped-call] # torch's own types
    loss, terms = step.loss(logits_TE, route(logits_TE) if routing is None else routing)
    return _ActByAutograd.apply(  # type: ignore[no-any-return, no-untyped-call] # torch's own types
        output, loss, state.loss_scale, terms, None if tracing else step
    )


def _keep_batch(
    state: BalanceState, names: list[str], module: nn.Module, args: Any, kwargs: Any
) -> None:
    """Forward pre-hook: remember the [N, S] attention mask and token ids of the batch."""
    for attribute, name in (("mask", "attention_mask"), ("ids", "input_ids")):
        found = kwargs.get(name)
        if found is None and name in names and len(args) > names.index(name):
            found = args[names.index(name)]
        setattr(state, attribute, found if isinstance(found, Tensor) and found.dim() == 2 else None)


def _keep_batch_of_part(
    state: BalanceState, names: list[str], module: nn.Module, args: Any, kwargs: Any
) -> None:
    """As _keep_batch, for a model's body: it may be called by itself, but then with token ids."""
    found = args[names.index("input_ids")] if args and names[0] == "input_ids" else None
    if kwargs.get("input_ids", found) is not None:
        _keep_batch(state, names, module, args, kwargs)


def watch_masks(model: nn.Module) -> dict[str, tuple[BalanceState, list[Any]]]:
    """Hook the stacks of a model so that each knows its batch's attention mask and token ids.

    An encoder-decoder has two stacks, whose masks differ; any other model has one, and its body
    (transformers' `base_model`) is watched too, because some trainers call that alone.

    Returns:
        {path of the stack in model: (its state, the hooks' handles)}.
    """
    stacks = {"": model}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_decoder"):
        parts = [getattr(model, f"get_{side}")() for side in ("encoder", "decoder")]
        stacks = {
            name: part for name, part in model.named_modules() if any(part is p for p in parts)
        }
    watched = {}
    for name, stack in stacks.items():
        names = list(inspect.signature(stack.forward).parameters)
        state = BalanceState()
        hook = partial(_keep_batch, state, names)
        watched[name] = (state, [stack.register_forward_pre_hook(hook, with_kwargs=True)])
    body = getattr(model, "base_model", None)
    if len(watched) == 1 and isinstance(body, nn.Module) and body is not model:
        state, handles = watched[""]
        names = list(inspect.signature(body.forward).parameters)
        hook = partial(_keep_batch_of_part, state, names)
        handles.append(body.register_forward_pre_hook(hook, with_kwargs=True))
    return watched


def balance_states(model: nn.Module) -> list[BalanceState]:
    """Return the distinct balance states of a model's adapted layers, in module order."""
    found: dict[int, BalanceState] = {}
    for module in model.modules():
        state = getattr(module, "rotmole_state", None)
        if isinstance(state, BalanceState):
            found[id(state)] = state
    return list(found.values())
