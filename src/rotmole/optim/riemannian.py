"""Riemannian preconditioning: steps of A and B scaled by the metric of their product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rotmole.errors import ConfigError
from rotmole.tuner.experts.experts import Experts
from rotmole.tuner.layer import RotMoleLayer

DELTA = 1e-6


def expert_modules(model: nn.Module) -> list[Experts]:
    """Return the Experts modules of all layers and adapters, in module order."""
    layers = [module for module in model.modules() if isinstance(module, RotMoleLayer)]
    return [layer.experts(name) for layer in layers for name in layer.rotmole_experts]


def preconditioned(grad_ERX: Tensor, other_ERY: Tensor, delta: float) -> Tensor:
    """Return (C C^T + d I)^-1 dX for every expert, where C is the pair's other factor.

    If all experts share one X (share_A), C C^T is summed over the experts, which is the metric of
    the stacked products.

    Args:
        grad_ERX: [E, R, X] gradient of one factor (E is 1 if the experts share it).
        other_ERY: [E, R, Y] the other factor (E is 1 if the experts share it).
        delta: d, which keeps the inverse finite.

    Returns:
        [E, R, X] in the gradient's type; solved in float64 (float32 on devices without it).

    Source: Riemannian preconditioned LoRA (arXiv 2402.02347), per expert in arXiv 2502.15828; the
    sum for a shared factor is ours.

    >>> preconditioned(torch.ones(1, 1, 3), torch.ones(1, 1, 4), 0.0)
    tensor([[[0.2500, 0.2500, 0.2500]]])
    """
    kind = torch.float32 if grad_ERX.device.type == "mps" else torch.float64
    other = other_ERY.detach().to(kind)
    gram_ERR = other @ other.mT
    if grad_ERX.shape[0] == 1:
        gram_ERR = gram_ERR.sum(0, keepdim=True)
    eye = torch.eye(gram_ERR.shape[-1], dtype=kind, device=gram_ERR.device)
    factor, _ = torch.linalg.cholesky_ex(gram_ERR + delta * eye)
    return torch.cholesky_solve(grad_ERX.to(kind), factor).to(grad_ERX.dtype)


@contextmanager
def _preconditioned_gradients(
    modules: Iterable[Experts], groups: Iterable[dict[str, Any]], delta: float
) -> Iterator[None]:
    """Replace the plain gradients by preconditioned ones inside the block."""
    trained = {id(p) for group in groups for p in group["params"]}
    plain: list[tuple[nn.Parameter, Tensor]] = []
    scaled: list[Tensor] = []
    for experts in modules:
        for factor, other in experts.factor_pairs():
            if factor.grad is not None and id(factor) in trained:
                check_unsharded(factor, other)
                plain.append((factor, factor.grad))
                scaled.append(preconditioned(factor.grad, other, delta))
    try:
        # only now, so that both factors are solved with the gradients and values before the step
        for (parameter, _), grad in zip(plain, scaled, strict=True):
            parameter.grad = grad
        yield
    finally:
        for parameter, grad in plain:
            parameter.grad = grad


def check_unsharded(*factors: Tensor) -> None:
    """Refuse parameters of which this process holds only a shard.

    Raises:
        ConfigError: one of them is sharded.
    """
    # not isinstance(DTensor): builds without torch.distributed lack that class
    if any(hasattr(tensor, "placements") or tensor.dim() != 3 for tensor in factors):
        raise ConfigError(
            "the Riemannian optimizers and Muon need the whole matrices A and B, but FSDP shards "
            "them; train with DDP or in one process, or choose another optimizer, such as "
            "adamw_torch"
        )


def plain_step(kind: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """Return a torch optimiser's step without the wrapper that would run step hooks twice."""
    step: Any = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return] # untyped


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Return what a closure of `step` returns, with gradients on; None if there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class RiemannianAdamW(torch.optim.AdamW):
    """AdamW on preconditioned gradients of the experts' factors A and B.

        dA <- (B B^T + d I)^-1 dA;   dB <- (A A^T + d I)^-1 dB      per expert, both from old values

    A pair is the A and B of one adapter in one layer. Routers, rotation gates and all other
    parameters take AdamW's ordinary step. A frozen factor still preconditions the other one.
    Under DDP the gradients are already averaged, so every process makes the same step.

    Args:
        params: parameters or groups, such as those of rotmole.parameter_groups.
        model: the model that holds the pairs.
        delta: d in the formula, above 0.
        options: of torch.optim.AdamW (lr, betas, eps, weight_decay ...).

    Raises:
        ConfigError: delta is not above 0; at a step, if A or B is sharded (FSDP).

    Source: arXiv 2502.15828, which steps B with the new A (its AdamW only); we use old values for
    both, as its SGD and its equations do.
    """

    def __init__(
        self, params: Any, *, model: nn.Module, delta: float = DELTA, **options: Any
    ) -> None:
        super().__init__(params, **options)
        self.delta = _checked(delta)
        self.expert_modules = expert_modules(model)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; the gradients are restored afterwards."""
        loss = loss_of(closure)
        with _preconditioned_gradients(self.expert_modules, self.param_groups, self.delta):
            plain_step(torch.optim.AdamW)(self)
        return loss


class RiemannianSGD(torch.optim.SGD):
    """SGD with the preconditioned gradients of RiemannianAdamW.

    For small d an update of the product B^T A does not depend on how it is split into A and B.
    Near B = 0 the step of A is up to 1/(2 sqrt(d)) times the plain one, so use a warmup.

    Args:
        params, model, delta: as for RiemannianAdamW.
        options: of torch.optim.SGD (lr, momentum ...).

    Raises:
        ConfigError: delta is not above 0; at a step, if A or B is sharded (FSDP).

    Source: arXiv 2502.15828.
    """

    def __init__(
        self, params: Any, *, model: nn.Module, delta: float = DELTA, **options: Any
    ) -> None:
        super().__init__(params, **options)
        self.delta = _checked(delta)
        self.expert_modules = expert_modules(model)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; the gradients are restored afterwards."""
        loss = loss_of(closure)
        with _preconditioned_gradients(self.expert_modules, self.param_groups, self.delta):
            plain_step(torch.optim.SGD)(self)
        return loss


def _checked(delta: float) -> float:
    if not delta > 0:
        raise ConfigError(
            f"delta is {delta!r}; it must be above 0, or the step divides by 0 at B = 0"
        )
    return delta
