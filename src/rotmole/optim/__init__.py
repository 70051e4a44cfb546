"""Optimisation: which parameters learn how fast."""

from rotmole.optim.groups import parameter_groups

__all__ = ["parameter_groups"]
