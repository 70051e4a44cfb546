"""DDP and FSDP2 on as many cards as there are find what one process finds. Started by torchrun:

    torchrun --standalone --nproc-per-node CARDS tests/gpu/ranks.py FILE

Every rank has rows of its own, of other number, length and padding. The gradients, balance loss
included, equal those of one process with all rows, in float64 and float32, with gradient
checkpointing too; after updates the adapter that FSDP2 gathers is the one of one process. Rank 0
writes each check and what it said into FILE. ROTMOLE_DEVICE=cpu is the dry run, over gloo.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from parallel_checks import (
    WRAPS,
    Batch,
    adapted,
    assert_ranks_agree,
    assert_same,
    batch,
    checkpointed,
    gradients,
    learnt,
    loss_of,
)
from rotmole import balance_states
from rotmole.processes import highest
from rotmole.training.sharding import adapter_state

ROWS = ((9, 6, 4), (3,), (7, 2), (5, 8))  # tokens of each row, rank by rank, over again
# float32 in float64 too: Llama's norms compute in it, and the mean over three ranks rounds there
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


def device_of(rank: int) -> torch.device:
    """Return this rank's card, or the CPU."""
    kind = os.environ.get("ROTMOLE_DEVICE", "cuda")
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)


def rows_of(rank: int, width: int | None = None) -> Batch:
    return batch(ROWS[rank % len(ROWS)], 10 * rank, width)


def everything(device: torch.device) -> Batch:
    """All ranks' rows in one batch."""
    world = dist.get_world_size()
    width = max(n for rank in range(world) for n in ROWS[rank % len(ROWS)])
    rows = [rows_of(rank, width) for rank in range(world)]
    ids, mask = (torch.cat(parts).to(device) for parts in zip(*rows, strict=True))
    return ids, mask


def alone(model: Any, device: torch.device) -> None:
    """One backward pass of one process on everybody's rows."""
    ids, mask = everything(device)
    (state,) = balance_states(model)
    state.managed, state.loss_scale = True, 1.0
    loss_of(model, ids, mask, learnt(mask)).backward()


def together(model: nn.Module, device: torch.device) -> None:
    """This rank's backward pass, weighed so that the mean over ranks is the mean over tokens."""
    ids, mask = (part.to(device) for part in rows_of(dist.get_rank()))
    _, all_mask = everything(device)
    world = dist.get_world_size()
    (state,) = balance_states(model)
    state.managed = True
    state.loss_scale = mask.sum().double() * world / all_mask.sum()
    loss_of(model, ids, mask, learnt(all_mask) / world).backward()


def same_gradients(wrap: str, dtype: torch.dtype, checkpoint: str, device: torch.device) -> None:
    model = adapted(dtype).to(device)
    one = copy.deepcopy(model)
    alone(one, device)
    checkpointed(model, checkpoint)
    wrapped, _ = WRAPS[wrap](model.train())
    together(wrapped, device)
    shared = gradients(wrapped)
    assert_same(shared, gradients(one), TOLERANCE[dtype])
    assert_ranks_agree(shared)


def same_updates(wrap: str, device: torch.device) -> None:
    model = adapted(torch.float64).to(device)
    one = copy.deepcopy(model)
    wrapped, _ = WRAPS[wrap](model)
    for side, backward in ((one, alone), (wrapped, together)):
        optimizer = torch.optim.SGD([p for p in side.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            backward(side, device)
            optimizer.step()
    ours, wanted = (
        {name: value.cpu() for name, value in adapter_state(side, device).items()}
        for side in (model, one)
    )
    assert_same(ours, wanted, TOLERANCE[torch.float64])


def checks(device: torch.device) -> dict[str, Callable[[], None]]:
    """Name every check."""
    named: dict[str, Callable[[], None]] = {}
    for wrap in WRAPS:
        for dtype in TOLERANCE:
            for checkpoint in ("no", "non-reentrant"):
                name = f"{wrap}, {str(dtype)[6:]}, checkpointing: {checkpoint}"
                named[name] = lambda w=wrap, d=dtype, c=checkpoint: same_gradients(w, d, c, device)
        named[f"{wrap}, three updates"] = lambda w=wrap: same_updates(w, device)
    return named


def main(file: str) -> int:
    """Run every check on every rank; a check fails for all if it fails for one."""
    device = device_of(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    said: dict[str, str] = {}
    for name, check in checks(device).items():
        error = ""
        try:
            check()
        except Exception:
            error = traceback.format_exc()
            print(f"rank {dist.get_rank()}: {name}\n{error}", file=sys.stderr, flush=True)
        failed = highest(int(bool(error)), device)
        said[name] = (error.strip().rpartition("\n")[2] or "another rank failed") if failed else ""
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps({"world": dist.get_world_size(), "checks": said}))
    dist.destroy_process_group()
    return int(any(said.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
