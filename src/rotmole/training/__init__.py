"""Training: one run file in, one run folder out."""

from rotmole.training.build import Built, build
from rotmole.training.callbacks import BalanceCallback
from rotmole.training.run import TrainResult, train

__all__ = ["BalanceCallback", "Built", "TrainResult", "build", "train"]
