"""Mixtures of low-rank experts gated by scaling and rotation, as an ordinary PEFT method.

Importing this package registers the method ROTMOLE with PEFT:

    import rotmole
    from peft import get_peft_model
    model = get_peft_model(base_model, rotmole.RotMoleConfig())
"""

from importlib.metadata import version

from rotmole.errors import (
    AdapterError,
    ConfigError,
    DataError,
    InputError,
    ModelError,
    NonFiniteError,
    RotMoleError,
    StorageError,
)
from rotmole.tuner.registration import add_member, register

add_member()  # before the configuration, which names the member, can be used

from rotmole.optim import parameter_groups  # noqa: E402  needs the member
from rotmole.recording.record import record_routing  # noqa: E402  needs the member
from rotmole.tuner.batch.loads import update_router_bias  # noqa: E402  needs the member
from rotmole.tuner.batch.losses import balance_states  # noqa: E402  needs the member
from rotmole.tuner.config import RotMoleConfig  # noqa: E402  needs the member
from rotmole.tuner.grow import grow  # noqa: E402  needs the member
from rotmole.tuner.model import RotMoleModel  # noqa: E402  needs the member

register()

__version__ = version("rotmole")

__all__ = [
    "AdapterError",
    "ConfigError",
    "DataError",
    "InputError",
    "ModelError",
    "NonFiniteError",
    "RotMoleConfig",
    "RotMoleError",
    "RotMoleModel",
    "StorageError",
    "__version__",
    "balance_states",
    "grow",
    "parameter_groups",
    "record_routing",
    "update_router_bias",
]
