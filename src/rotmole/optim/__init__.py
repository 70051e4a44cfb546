"""Optimisation: parameter groups with their learning rates, Riemannian optimisers, and Muon."""

from rotmole.optim.groups import parameter_groups
from rotmole.optim.muon import Muon
from rotmole.optim.riemannian import RiemannianAdamW, RiemannianSGD

__all__ = ["Muon", "RiemannianAdamW", "RiemannianSGD", "parameter_groups"]
