"""Let a balance loss act on the routers wherever the model is trained.

A loss added to `outputs.loss` is lost under reentrant checkpointing, in trainers that compute their
own loss, and is counted once per process. Here an identity function on the layer's output adds
the loss's gradient in the backward pass, which every trainer runs once per micro-batch. The price:
the loss is not part of the reported loss (read it with `BalanceState.pop`), and with gradient
accumulation or several processes somebody must say what share of the step a micro-batch is
(`BalanceState.loss_scale`, set by rotmole.training's trainer, for other trainers by its callback).

One limit: a second derivative through the output would meet the function again and add the
gradient twice, so with a balance loss on PyTorch refuses one (create_graph=True, then backward).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rotmole.errors import DataError
from rotmole.ops.compiled import compiled, letters_of, may_compile
from rotmole.ops.routing.balance import balance_gradient, load_balance_loss, router_z_loss
from rotmole.ops.routing.route import select_by
from rotmole.ops.routing.selection import Routed, Routing
from rotmole.ops.routing.task_balance import task_balance_loss
from rotmole.ops.spec import Spec, Tokens
from rotmole.ops.transforms import is_transformed
from rotmole.tuner.batch.batch import Batch, Layout
from rotmole.tuner.batch.reading import TASKS

Terms = tuple[Tensor, Tensor, float | Tensor, float | Tensor]
"""One layer's balance, z and task loss, each times tokens, and tokens."""


def _sum(so_far: float | Tensor, more: float | Tensor) -> float | Tensor:
    """Add two numbers, which may lie on two devices."""
    if isinstance(so_far, Tensor) and isinstance(more, Tensor):
        more = more.to(so_far.device)
    return so_far + more


@dataclass(eq=False)
class BalanceState:
    """What the losses of one part of a model (a whole model, an encoder, a decoder) sum up.

    Attributes:
        loss_scale: multiplies the losses' gradient, the loss scale of fp16 training included. As
            processes average their gradients, it is exact at tokens of the micro-batch / (tokens
            of the step in all processes / processes), padding not counted; with equal
            micro-batches that is 1 / micro-batches of the step.
        managed: True when somebody sets loss_scale at each step; silences the warning about it.
        wants_tasks: whether the localised loss is on, so that `pop` reports it.
        count: layers recorded since the last `pop`.
        sums: of the balance, z and task loss times their tokens, and of the tokens, since the last
            `pop`; a loss that never ran has 0.
    """

    managed: bool = False
    wants_tasks: bool = False
    warned: bool = False
    count: int = 0
    sums: list[float | Tensor] = field(default_factory=lambda: [0] * 4)
    scale_as_tensor: Tensor = field(default_factory=lambda: torch.ones(()))
    _scale: float | Tensor = 1.0

    @property
    def loss_scale(self) -> float | Tensor:
        """The scale; torch.compile, which compiles each number anew, reads scale_as_tensor."""
        return self._scale

    @loss_scale.setter
    def loss_scale(self, scale: float | Tensor) -> None:
        self._scale = scale
        if not isinstance(scale, Tensor):
            scale = torch.tensor(scale, dtype=torch.float64)
        self.scale_as_tensor = scale.detach()

    def pop(self, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float] | None:
        """Return the mean losses over the tokens since the last call, and forget them.

        Args:
            total: sums a tensor over processes, each of which then calls this; None keeps to one.

        Returns:
            {"router_aux_loss": 1 when balanced, "router_z_loss": ...} and, if it is on,
            "router_task_loss"; None if none ran.
        """
        if not self.count:
            return None
        like = next(each for each in self.sums if isinstance(each, Tensor))
        sums = torch.stack([torch.as_tensor(each).to(like) for each in self.sums])
        balance, z, task, tokens = (sums if total is None else total(sums)).tolist()
        self.count, self.sums = 0, [0] * 4
        tokens = max(tokens, 1)
        means = {"router_aux_loss": balance / tokens, "router_z_loss": z / tokens}
        return means | ({"router_task_loss": task / tokens} if self.wants_tasks else {})

    def record(self, terms: Terms) -> None:
        """Add one layer's balance, z and task loss, each times tokens, and tokens for `pop`."""
        self.count += 1
        self.sums = [_sum(*pair) for pair in zip(self.sums, terms, strict=True)]

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
class LossWeights:
    """Weights of the losses in one layer, already divided by the number of adapted layers.

    Attributes:
        balance, z, task: coefficients of the three losses.
        scope: "sequence" or "micro_batch": over what the balance loss takes its shares.
        task_offset, task_groups: of the localised loss.
        watches_accumulation: whether this layer, one of its part of the model, warns if gradients
            are accumulated and nobody sets loss_scale.
    """

    balance: float = 0.0
    z: float = 0.0
    scope: str = "sequence"
    task: float = 0.0
    task_offset: float = 0.0
    task_groups: int = 1
    watches_accumulation: bool = False

    @property
    def act(self) -> bool:
        """Whether any loss is on."""
        return bool(self.balance or self.z or self.task)


@dataclass(frozen=True)
class _Pass:
    """One forward pass of one layer, as its losses see it.

    Attributes:
        state, weights, spec: of the part of the model, and of the layer.
        tokens: sequences whose statistics are apart; one if all tokens are together.
        weight_T: [T] how much each token counts, None if all count 1.
        group_N, row_T: [N] task of each row, or of each sequence of packed rows, and [T] which of
            these N each token is of; None without task loss.
        router: a parameter of the router, in the layer that watches for accumulation.
    """

    state: BalanceState
    weights: LossWeights
    spec: Spec
    tokens: Tokens
    weight_T: Tensor | None
    group_N: Tensor | None
    row_T: Tensor | None
    router: Tensor | None

    def loss(self, logits_TE: Tensor, routing: Routing) -> tuple[Tensor, Terms]:
        """Return the weighted sum of the losses, and what `record` takes, by autograd."""
        weights, weight_T, count = self.weights, self.weight_T, len(logits_TE)
        balance = load_balance_loss(
            routing.probability_TE,
            routing.selected_TE,
            sequence_T=self.tokens.numbers(count, logits_TE.device),
            sequences=self.tokens.sequences,
            mask_T=weight_T,
        )
        z = router_z_loss(logits_TE, weight_T)
        loss = weights.balance * balance + weights.z * z
        total = count if weight_T is None else weight_T.sum().to(balance)
        terms: Terms = (balance.detach() * total, z.detach() * total, 0, total)
        if self.group_N is not None and self.row_T is not None:
            task = task_balance_loss(
                routing.weight_TE,
                self.row_T,
                self.group_N,
                groups=weights.task_groups,
                offset=weights.task_offset,
                mask_T=weight_T,
            )
            loss = loss + weights.task * task
            terms = (*terms[:2], task.detach() * total, total)
        return loss, terms

    def record(self, terms: Terms) -> None:
        """Note that the backward pass came by."""
        self.state.record(terms)
        if self.router is not None:
            self.state.warn_of_accumulation(self.router)


def same(output: Tensor) -> Tensor:
    """Return a tensor with the memory of `output` that autograd takes for no view of it.

    A model may change it in place, as Falcon adds to its layers' outputs, which autograd refuses
    for a view that comes out of a hand-written function. Nobody else reads `output` afterwards.
    """
    return output.view_as(output) if torch.compiler.is_compiling() else output.data


def _by_hand(
    kind: tuple[float, float], tensors: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return what balance_gradient does; in place of a number of tokens that a shape says, None.

    Args:
        kind: coefficients of the balance and the z loss.
        tensors: as BY_HAND names them: scores [E, N, T / N] of a plain router, for N sequences of
            one length, or [E, T]; the experts that they chose; how much each token counts; each
            token's sequence, where they are of several lengths, and N zeros.
    """
    (balance, z), (logits, index_KT, weight_T, sequence_T, zero_N) = kind, tensors
    assert logits is not None
    gradient = balance_gradient(
        logits.flatten(1),
        index_KT,
        # len would fix the number, for kernels
        sequences=logits.shape[1] if zero_N is None else zero_N.shape[0],
        balance=balance,
        z=z,
        mask_T=weight_T,
        sequence_T=sequence_T,
    )
    tokens = gradient.tokens if isinstance(gradient.tokens, Tensor) else None
    return gradient.logits_ET.mT, gradient.balance, gradient.z, tokens


BY_HAND = letters_of(["logits_ENT", "index_KT", "weight_T", "sequence_T", "zero_N"])


class _ActByHand(torch.autograd.Function):
    """The identity on `output`; in backward, a plain router's logits receive the gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, logits_TE: Tensor, index_KT: Tensor | None, step: _Pass
    ) -> Tensor:
        ctx.save_for_backward(logits_TE, index_KT)
        ctx.step, ctx.scale = step, step.state.loss_scale
        return same(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (logits_TE, index_KT), step = ctx.saved_tensors, ctx.step
        sequences, sequence_T = step.tokens.sequences, step.tokens.sequence_T
        logits, zero_N, letters = logits_TE.mT, None, BY_HAND
        if sequence_T is None:
            logits = logits.unflatten(1, (sequences, len(logits_TE) // max(sequences, 1)))
        else:
            zero_N, letters = logits.new_zeros(sequences), ("ET", *BY_HAND[1:])
        kind = step.weights.balance, step.weights.z
        given = (logits, index_KT, step.weight_T, sequence_T, zero_N)
        if may_compile(step.spec, logits_TE):
            gradient_TE, balance, z, tokens = compiled(_by_hand, kind, given, letters)
        else:
            gradient_TE, balance, z, tokens = _by_hand(kind, given)
        step.record((balance, z, 0, len(logits_TE) if tokens is None else tokens))
        plain = not isinstance(ctx.scale, Tensor) and ctx.scale == 1
        return grads[0], gradient_TE if plain else gradient_TE * ctx.scale, None, None


class _ActByAutograd(torch.autograd.Function):
    """The identity on `output`; in backward, `loss` receives the gradient `scale`."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, loss: Tensor, scale: float | Tensor, terms: Terms, step: Any
    ) -> Tensor:
        ctx.scale, ctx.terms, ctx.step, ctx.dtype = scale, terms, step, loss.dtype
        return same(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.step is not None:
            ctx.step.record(ctx.terms)
        scale = torch.as_tensor(ctx.scale, dtype=ctx.dtype, device=grads[0].device)
        return grads[0], scale, None, None, None


class _ActUnderTransform(torch.autograd.Function):
    """As _ActByAutograd, in the form that torch.func can follow; nothing is recorded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, loss, scale = inputs
        ctx.save_for_backward(scale.to(loss))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return grads[0], scale.clone(), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].clone()


def add_balance(
    output: Tensor,
    routed: Routed,
    spec: Spec,
    batch: Batch,
    layout: Layout | None,
    state: BalanceState,
    weights: LossWeights,
    router: Tensor,
) -> Tensor:
    """Return `output`, made so that its backward pass adds the gradient of the balance losses.

    Args:
        output: the layer's addition, any shape.
        routed: what the router said of the T tokens of the layer's input.
        spec: of the layer.
        batch: at hand.
        layout: of the layer's input in the batch; None if its rows cannot be told.
        state: scale and record of the part of the model.
        weights: of the losses.
        router: a parameter of the router.

    Returns:
        A tensor equal to output.

    Raises:
        DataError: the batch names a task group that the adapter does not have.
    """
    tracing = torch.compiler.is_compiling()  # a record kept in an attribute does not compile
    tokens = Tokens() if layout is None or weights.scope != "sequence" else layout.tokens
    group_N = row_T = None
    count = routed.logits_TE.shape[0]
    if weights.task and layout is not None and layout.rows and batch.tasks is not None:
        check_tasks(batch, weights.task_groups)
        group_N = batch.tasks.to(output.device)
        by_row = len(group_N) == layout.rows
        by = Tokens(sequences=layout.rows) if by_row else layout.tokens
        row_T = by.numbers(count, output.device)
    step = _Pass(
        state,
        weights,
        spec,
        tokens=tokens,
        weight_T=None if layout is None else layout.weight_T,
        group_N=group_N,
        row_T=row_T,
        router=router if weights.watches_accumulation else None,
    )
    logits_TE, routing, index_KT = routed
    transformed = is_transformed()
    if routing is None and group_N is None and not (tracing or transformed):
        return _ActByHand.apply(output, logits_TE, index_KT, step)  # type: ignore[no-any-return, no-untyped-call] # torch's own types
    routing = select_by(spec, logits_TE) if routing is None else routing
    loss, terms = step.loss(logits_TE, routing)
    if transformed:
        return _ActUnderTransform.apply(output, loss, state.scale_as_tensor)  # type: ignore[no-any-return, no-untyped-call] # torch's own types
    scale = state.scale_as_tensor if tracing else state.loss_scale
    return _ActByAutograd.apply(  # type: ignore[no-any-return, no-untyped-call] # torch's own types
        output, loss, scale, terms, None if tracing else step
    )


def check_tasks(batch: Batch, groups: int) -> None:
    """Refuse task groups of a batch that an adapter does not have; once a batch, not once a layer.

    Args:
        batch: with tasks.
        groups: how many groups the adapter has.

    Raises:
        DataError: naming the group.
    """
    tasks = batch.tasks
    if tasks is None or batch.checked_groups == groups or torch.compiler.is_compiling():
        return
    low, high = (int(tasks.min()), int(tasks.max())) if tasks.numel() else (0, 0)
    if low < 0 or high >= groups:
        raise DataError(
            f"{TASKS} holds {low if low < 0 else high}; it is the group of a row's task and must "
            f"lie in 0..{groups - 1}, because router_task_groups is {groups}"
        )
    batch.checked_groups = groups


def balance_states(model: nn.Module) -> list[BalanceState]:
    """Return the distinct balance states of a model's adapted layers, in module order."""
    states: dict[int, BalanceState] = {}
    for module in model.modules():
        state = getattr(module, "rotmole_state", None)
        if isinstance(state, BalanceState):
            states[id(state)] = state
    return list(states.values())
