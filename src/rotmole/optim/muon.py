"""Muon for stacks of experts: each expert's A and B is one matrix; AdamW steps all else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rotmole.errors import ConfigError
from rotmole.optim.riemannian import check_unsharded, expert_modules, loss_of, plain_step

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7


def orthogonalised(matrix_EXY: Tensor) -> Tensor:
    """Return U V^T of every matrix U S V^T, nearly: five Newton-Schulz steps in bfloat16.

        X <- a X + (b X X^T + c (X X^T)^2) X,   from X = M / |M|;   (a, b, c) = COEFFICIENTS

    Args:
        matrix_EXY: [E, X, Y]; a matrix of zeros stays zero.

    Returns:
        [E, X, Y] in bfloat16, with singular values between about 0.7 and 1.2.

    Source: Keller Jordan's Muon, as in torch.optim.Muon, here for a stack at once.
    """
    a, b, c = COEFFICIENTS
    wide = matrix_EXY.shape[-2] <= matrix_EXY.shape[-1]
    X = (matrix_EXY if wide else matrix_EXY.mT).bfloat16()
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X if wide else X.mT


class Muon(torch.optim.AdamW):
    """Muon for the experts' factors A and B, AdamW for everything else, with one learning rate.

        M <- mu M + (1 - mu) G;   N = (1 - mu) G + mu M
        W <- (1 - lr decay) W - 0.2 lr sqrt(max(rows, columns)) UV^T(N)      per expert

    On one matrix that is torch.optim.Muon with adjust_lr_fn="match_rms_adamw", whose steps are as
    long as AdamW's, so AdamW's learning rates and weight decay serve. torch's own takes no stacks
    [E, R, D]. An expert that no token of the update chose has no gradient and is left as it is.

    Args:
        params: parameters or groups, such as those of rotmole.parameter_groups.
        model: the model that holds the experts.
        momentum: mu, at least 0 and below 1.
        options: of torch.optim.AdamW (lr, weight_decay; betas and eps act on the rest alone).

    Raises:
        ConfigError: momentum is out of range; at a step, if A or B is sharded (FSDP).

    Source: Muon is scalable (arXiv 2502.16982) for the length of the step.
    """

    def __init__(
        self, params: Any, *, model: nn.Module, momentum: float = 0.95, **options: Any
    ) -> None:
        super().__init__(params, **options)
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum is {momentum!r}; it must be at least 0 and below 1")
        self.momentum = momentum
        modules = expert_modules(model)
        self.factors = {id(p) for experts in modules for p, _ in experts.factor_pairs()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; the gradients are restored afterwards."""
        loss = loss_of(closure)
        stepped: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in self.factors and parameter.grad is not None:
                        check_unsharded(parameter)
                        stepped.append((parameter, parameter.grad))
                        self._step_factor(parameter, parameter.grad, group)
                        parameter.grad = None  # AdamW passes by
            plain_step(torch.optim.AdamW)(self)
        finally:
            for parameter, grad in stepped:
                parameter.grad = grad
        return loss

    def _step_factor(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            # AdamW, which loads a saved state, asks each parameter for its number of steps
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum_buffer"] = torch.zeros_like(grad)
        state["step"] += 1
        used_E = (grad != 0).flatten(1).any(1)[:, None, None]
        buffer, lr = state["momentum_buffer"], float(group["lr"])
        buffer.copy_(torch.where(used_E, buffer.lerp(grad, 1 - self.momentum), buffer))
        update = orthogonalised(grad.lerp(buffer, self.momentum)).to(weight.dtype)
        length = 0.2 * lr * max(weight.shape[-2:]) ** 0.5
        new = (1 - lr * group["weight_decay"]) * weight - length * update
        weight.copy_(torch.where(used_E, new, weight))
