"""Write a folder so that a disk which refuses leaves nothing half-written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rotmole.files import storage_errors
from rotmole.training.checkpoints.seal import remove

_TORCH_WRITES = ("PytorchStreamWriter", "cannot be opened", "Parent directory")
"""Words of torch.save when a file cannot be written."""


@contextmanager
def nothing_half_written(checkpoint: Path) -> Iterator[None]:
    """Write a checkpoint inside the block; if the disk refuses, leave nothing half-written.

    Raises:
        StorageError: the disk refused, however torch, safetensors or Python report it.
    """
    try:
        with storage_errors(checkpoint):
            try:
                yield
            except (RuntimeError, SafetensorError) as error:
                refused = _as_os_error(error, checkpoint)
                if refused is None:
                    raise
                raise refused from error
    except OSError:
        remove(checkpoint)
        raise


def _as_os_error(error: Exception, folder: Path) -> OSError | None:
    """Find the disk's refusal in an error of torch, which has no number, or of safetensors."""
    number = re.search(r"os error (\d+)", str(error))
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if not any(words in str(error) for words in _TORCH_WRITES):
        return None
    probe = folder / ".probe"
    try:  # torch hides the reason, so ask the disk once more
        probe.write_bytes(bytes(1 << 20))
        probe.unlink()
    except OSError as refused:
        return refused
    return OSError(str(error).splitlines()[0])
