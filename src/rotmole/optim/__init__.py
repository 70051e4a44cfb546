"""Optimisation: parameter groups with their learning rates, and Riemannian optimisers."""

from rotmole.optim.groups import parameter_groups
from rotmole.optim.riemannian import RiemannianAdamW, RiemannianSGD

__all__ = ["RiemannianAdamW", "RiemannianSGD", "parameter_groups"]
