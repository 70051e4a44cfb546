"""Two processes do what one does: loss-free balancing and Riemannian steps under DDP."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

import tiny
from rotmole import RotMoleConfig, parameter_groups, update_router_bias
from rotmole.optim import RiemannianSGD

pytestmark = pytest.mark.heavy  # starts processes


def _adapted() -> PeftModel:
    torch.manual_seed(2)
    config = RotMoleConfig(
        r=2, num_experts=4, rotation="none", target_modules=["q_proj"], router_bias_rate=0.01,
        init_weights=False,
    )  # fmt: skip
    return get_peft_model(tiny.llama(), config).double().train()


def _step(model: torch.nn.Module, bare: PeftModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    optimizer = RiemannianSGD(parameter_groups(bare, lr=0.1), model=bare, delta=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        update_router_bias(bare)
    trained = {n: p.detach() for n, p in bare.named_parameters() if p.requires_grad}
    return trained | {n: b for n, b in bare.named_buffers() if n.endswith("router_bias")}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(folder, "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    bare = _adapted()
    model = DistributedDataParallel(bare)
    found = _step(model, bare, tiny.tokens(4, 6)[2 * rank : 2 * rank + 2])
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    model = _adapted()
    wanted = _step(model, model, tiny.tokens(4, 6))
    multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    sides = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert any(bias.any() for name, bias in wanted.items() if name.endswith("router_bias"))
    for name, value in wanted.items():
        torch.testing.assert_close(sides[0][name], value, rtol=1e-9, atol=1e-11, msg=name)
        assert torch.equal(sides[0][name], sides[1][name]), name
