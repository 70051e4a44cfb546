"""Recording: what routers and rotations did, as sums over tokens, and short diagnoses of it.

record.py attaches to a model and sums up; statistics.py says what the sums mean; watch.py is the
one place that looks into a forward pass. `rotmole.record_routing` is the door.
"""

from rotmole.recording.log import RoutingLog
from rotmole.recording.record import record_routing
from rotmole.recording.statistics import LayerStatistics, MutualInformation, TaskStatistics

__all__ = [
    "LayerStatistics",
    "MutualInformation",
    "RoutingLog",
    "TaskStatistics",
    "record_routing",
]
