"""What happens beside a training step; each is an ordinary transformers TrainerCallback.

`BalanceCallback` is the one that users of other trainers need when they accumulate gradients,
`Float32Callback` the one for TRL's trainers on a quantised base.
"""

from rotmole.training.callbacks.balance import BalanceCallback, BiasCallback
from rotmole.training.callbacks.float32 import Float32Callback
from rotmole.training.callbacks.metrics import JsonLinesCallback
from rotmole.training.callbacks.progress import ProgressCallback
from rotmole.training.callbacks.stop import StopOnSignal
from rotmole.training.callbacks.usage import UsageCallback

__all__ = [
    "BalanceCallback",
    "BiasCallback",
    "Float32Callback",
    "JsonLinesCallback",
    "ProgressCallback",
    "StopOnSignal",
    "UsageCallback",
]
