"""Optimisation: which parameters learn how fast, and in what metric."""

from rotmole.optim.groups import parameter_groups
from rotmole.optim.riemannian import RiemannianAdamW, RiemannianSGD

__all__ = ["RiemannianAdamW", "RiemannianSGD", "parameter_groups"]
