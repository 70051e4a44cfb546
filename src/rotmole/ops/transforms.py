"""Whether torch.func or forward-mode differentiation follows the computation at hand."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Tell whether a transform (grad, vmap, jvp ...) or a dual level of forward mode is active.

    They follow every step by themselves and know no hand-written backward pass, so the slow twins
    take the place of the fast functions there. torch.compile, which traces through transforms of
    its own, is none.

    >>> is_transformed(), torch.func.grad(lambda x: x * is_transformed())(torch.tensor(3.0))
    (False, tensor(1.))
    """
    if torch.compiler.is_compiling():
        return False
    # there is no public way to ask
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )
