"""Optimisation: parameter groups, rates by load, Riemannian optimisers, and Muon."""

from rotmole.optim.expert_rates import ExpertRates
from rotmole.optim.groups import parameter_groups
from rotmole.optim.muon import Muon
from rotmole.optim.riemannian import RiemannianAdamW, RiemannianSGD

__all__ = ["ExpertRates", "Muon", "RiemannianAdamW", "RiemannianSGD", "parameter_groups"]
