"""What two ranks do in test_ranks.py: the same model under DDP and FSDP2, beside one process.

Every rank has rows of its own, of other number, length and padding. One process has them all in
one batch; its loss, balance loss included, is the mean over all tokens, and so is theirs.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import tiny
from rotmole import ConfigError, RotMoleConfig, balance_states, record_routing
from rotmole.ops.routing.route import select_by
from rotmole.optim import ExpertRates
from rotmole.processes import highest
from rotmole.recording.statistics import as_dict
from rotmole.training.sharding import adapter_state

CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor]
Lengths = tuple[tuple[tuple[int, ...], ...], ...]
LENGTHS: Lengths = (((9, 6, 4), (5, 8)), ((3,), (7, 2)))
"""rank -> micro-batch -> tokens of each row."""


def adapted(dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    config = RotMoleConfig(
        **(
            {
                "r": 4, "num_experts": 6, "top_k": 2, "target_modules": ["q_proj", "v_proj"],
                "router_aux_loss_coef": 5.0, "router_z_loss_coef": 0.5, "init_weights": False,
                "task_type": "CAUSAL_LM",
            }
            | settings
        )
    )  # fmt: skip
    torch.manual_seed(1)
    return get_peft_model(tiny.llama(), config).to(dtype)


def batch(lengths: tuple[int, ...], seed: int, width: int | None = None) -> Batch:
    """Rows padded on the right to the longest, or to a width; of no tokens, to one."""
    longest = max(*lengths, 1)
    ids = tiny.tokens(len(lengths), longest, seed)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    more = (width or longest) - longest
    return nn.functional.pad(ids * mask, (0, more)), nn.functional.pad(mask, (0, more))


def rank_batches(rank: int, parts: int, lengths: Lengths = LENGTHS) -> list[Batch]:
    return [batch(lengths[rank][part], 10 * rank + part) for part in range(parts)]


def everything(parts: int, lengths: Lengths = LENGTHS) -> Batch:
    """All ranks' rows in one batch."""
    width = max(n for rank in lengths for part in rank[:parts] for n in part)
    rows = [batch(lengths[r][p], 10 * r + p, width) for r in (0, 1) for p in range(parts)]
    return torch.cat([ids for ids, _ in rows]), torch.cat([mask for _, mask in rows])


def loss_of(model: nn.Module, ids: Tensor, mask: Tensor, tokens: float) -> Tensor:
    """Summed cross-entropy of the tokens that follow another, over a number of tokens."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / tokens


def learnt(mask: Tensor) -> int:
    return int(mask[:, 1:].sum())


def backward(
    model: nn.Module,
    batches: list[Batch],
    parts: int,
    silent: Callable[[bool], Any],
    lengths: Lengths = LENGTHS,
) -> None:
    """One update's backward passes on this rank, weighed so that the mean over ranks is right."""
    _, mask = everything(parts, lengths)
    world = dist.get_world_size()
    (state,) = balance_states(model)
    state.managed = True
    for number, (ids, kept) in enumerate(batches):
        state.loss_scale = kept.sum().double() / (mask.sum() / world)
        with silent(number < len(batches) - 1):
            loss_of(model, ids, kept, learnt(mask) / world).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            assert value.grad is not None, name
            grad = value.grad
            plain = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name.removeprefix("module.")] = plain.detach().clone()
    return found


def expected(model: PeftModel, parts: int, lengths: Lengths = LENGTHS) -> dict[str, Tensor]:
    """The gradient that one process finds on everybody's rows."""
    alone = copy.deepcopy(model)
    ids, mask = everything(parts, lengths)
    (state,) = balance_states(alone)
    state.managed, state.loss_scale = True, 1.0
    loss_of(alone, ids, mask, learnt(mask)).backward()
    return gradients(alone)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        largest = value.abs().max().item()
        difference = (ours[name] - value).abs().max().item()
        assert difference <= tolerance * max(largest, 1e-6), (name, difference, largest)


def assert_ranks_differ(ours: dict[str, Tensor]) -> None:
    """Every adapter tensor's gradient differs between the ranks."""
    for name, value in ours.items():
        every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(every, value)
        assert not torch.equal(*every), name


def assert_ranks_agree(ours: dict[str, Tensor]) -> None:
    for name, value in ours.items():
        every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(every, value)
        assert all(torch.equal(value, other) for other in every), name


def with_ddp(model: PeftModel) -> tuple[nn.Module, Callable[[bool], Any]]:
    wrapped = DistributedDataParallel(model)

    def silent(wait: bool) -> Any:
        return wrapped.no_sync() if wait else contextlib.nullcontext()

    return wrapped, silent


def with_fsdp(model: PeftModel) -> tuple[nn.Module, Callable[[bool], Any]]:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)

    @contextlib.contextmanager
    def silent(wait: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(not wait)
        yield

    return model, silent


WRAPS = {"ddp": with_ddp, "fsdp2": with_fsdp}


def checkpointed(model: PeftModel, kind: str) -> None:
    if kind != "no":
        model.enable_input_require_grads()
        tiny.enable_checkpointing(model, kind == "reentrant")


def equals_one_process(
    wrap: str,
    parts: int = 1,
    checkpoint: str = "no",
    dtype: str = "float64",
    second: tuple[int, ...] = (),
    only: int | None = None,
) -> None:
    """The gradients; with a second rank's rows of its own, or with one expert for all tokens."""
    lengths = (LENGTHS[0], (second,)) if second else LENGTHS
    one = {} if only is None else {"top_k": 1, "router_bias_rate": 1e-3}
    model = adapted(getattr(torch, dtype), **one)
    if only is not None:
        send_all_to(model, only)
    wanted = expected(model, parts, lengths)
    if only is not None:
        used = {n: v.flatten(1).any(1) for n, v in wanted.items() if n.endswith("expert_B")}
        assert all(u.nonzero().flatten().tolist() == [only] for u in used.values()), used
    checkpointed(model, checkpoint)
    model.train()
    wrapped, silent = WRAPS[wrap](model)
    for _ in range(2):  # the second time is where what the first left behind would show
        wrapped.zero_grad()
        backward(wrapped, rank_batches(dist.get_rank(), parts, lengths), parts, silent, lengths)
        found = gradients(wrapped)
        assert_same(found, wanted, 1e-12 if dtype == "float64" else 1e-5)
        assert_ranks_agree(found)


def send_all_to(model: PeftModel, expert: int) -> None:
    """Let every token choose one expert and no other: its bias outweighs every score."""
    for layer in model.modules():
        if hasattr(layer, "rotmole_experts"):
            layer.experts("default").router_bias[expert] = 1e3


def ranks_find_different_gradients_before_they_exchange_them() -> None:
    model = adapted()
    wrapped, _ = with_ddp(model)
    backward(wrapped, rank_batches(dist.get_rank(), 1), 1, lambda wait: wrapped.no_sync())
    alone = gradients(wrapped)
    assert_ranks_differ(alone)
    for value in alone.values():
        dist.all_reduce(value)
    assert_same({n: v / 2 for n, v in alone.items()}, expected(model, 1), 1e-12)


def an_expert_is_used_on_one_rank_alone() -> None:
    """The rows above are such a case: in some layer an expert that rank 0 uses rests on rank 1."""
    model = adapted()
    used: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        logits_TE, routing, _ = output[1]
        routing = select_by(module.spec, logits_TE) if routing is None else routing
        used.append(routing.selected_TE.any(0))

    for layer in model.modules():
        if hasattr(layer, "rotmole_experts"):
            layer.experts("default").register_forward_hook(watch)
    with torch.no_grad():
        for ids, mask in rank_batches(dist.get_rank(), 1):
            model(input_ids=ids, attention_mask=mask)
    mine = torch.stack(used)
    every = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(every, mine)
    assert (every[0] & ~every[1]).any()


def a_mean_over_ranks_is_not_the_mean_over_tokens() -> None:
    """Why the balance loss is weighed: with every rank counting alike, the gradient is another."""
    model = adapted()
    wrapped, _ = with_ddp(model)
    ids, mask = rank_batches(dist.get_rank(), 1)[0]
    balance_states(wrapped)[0].managed = True
    loss_of(wrapped, ids, mask, learnt(everything(1)[1]) / 2).backward()
    wanted = expected(model, 1)
    routers = [n for n in wanted if n.endswith("router_weight")]
    found = gradients(wrapped)
    assert all((found[n] - wanted[n]).abs().max() > 1e-3 * wanted[n].abs().max() for n in routers)


def sgd_steps_agree() -> None:
    """Three updates under both, beside one process: the same weights."""
    base = adapted()
    alone = copy.deepcopy(base)
    weights = {}
    for name in ("one", *WRAPS):
        model = alone if name == "one" else copy.deepcopy(base)
        wrapped, silent = (model, None) if name == "one" else WRAPS[name](model)
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            if silent is None:
                ids, mask = everything(1)
                balance_states(model)[0].managed = True
                loss_of(model, ids, mask, learnt(mask)).backward()
            else:
                backward(wrapped, rank_batches(dist.get_rank(), 1), 1, silent)
            optimizer.step()
        state = adapter_state(model, CPU)
        weights[name] = {n: v.detach().clone() for n, v in state.items()}
    start = adapter_state(base, CPU)
    assert all(not torch.equal(value, weights["one"][name]) for name, value in start.items())
    for name in WRAPS:
        assert_same(weights[name], weights["one"], 1e-12)


def old_experts_stay() -> None:
    """Three updates with weight decay of a grown mixture: what is frozen stays, in every bit."""
    base = adapted(experts_added=[2], freeze_old=["experts", "router"])
    start = {n: v.detach().clone() for n, v in adapter_state(base, CPU).items()}
    weights = {}
    for name in ("one", *WRAPS):
        model = copy.deepcopy(base)
        wrapped, silent = (model, None) if name == "one" else WRAPS[name](model)
        learns = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learns, lr=0.01, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            if silent is None:
                ids, mask = everything(2)
                balance_states(model)[0].managed = True
                loss_of(model, ids, mask, learnt(mask)).backward()
            else:
                backward(wrapped, rank_batches(dist.get_rank(), 2), 2, silent)
            torch.nn.utils.clip_grad_norm_(learns, 0.1)
            optimizer.step()
        state = adapter_state(model, CPU)
        weights[name] = {n: v.detach().clone() for n, v in state.items()}
    for name, value in start.items():
        for way, trained in weights.items():
            assert torch.equal(value, trained[name]) != name.endswith("_1"), (way, name)
    for way in WRAPS:
        assert_same(weights[way], weights["one"], 1e-8)


def rates_by_load_agree() -> None:
    """Shares are of all ranks' tokens, so that every rank steps by the same rates."""
    base = adapted()
    alone = copy.deepcopy(base)
    weights, factors = {}, {}
    for name in ("one", "ddp"):
        model = alone if name == "one" else copy.deepcopy(base)
        wrapped, silent = (model, None) if name == "one" else with_ddp(model)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, eps=1e-3)
        rates = ExpertRates(optimizer, model=model, decay=0.5)
        if silent is None:
            ids, mask = everything(2)
            balance_states(model)[0].managed = True
            loss_of(model, ids, mask, learnt(mask)).backward()
        else:
            backward(wrapped, rank_batches(dist.get_rank(), 2), 2, silent)
        optimizer.step()
        weights[name] = {n: v.detach().clone() for n, v in adapter_state(model, CPU).items()}
        factors[name] = rates.factors()
    assert_ranks_agree(weights["ddp"])
    assert any((factor_E != 1).any() for factor_E in factors["one"].values())
    # in the one process both ranks count the same rows, so the shares are equal
    assert_same(factors["ddp"], factors["one"], 1e-6)
    assert_same(weights["ddp"], weights["one"], 1e-6)
    wrapped, silent = with_fsdp(copy.deepcopy(base))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    ExpertRates(optimizer, model=wrapped)
    backward(wrapped, rank_batches(dist.get_rank(), 2), 2, silent)
    with pytest.raises(ConfigError, match="FSDP shards them"):
        optimizer.step()


def a_sharded_adapter_is_saved_whole(folder: str) -> None:
    base = adapted(torch.float32)
    model = copy.deepcopy(base)
    with_fsdp(model)
    shard = next(p for n, p in model.named_parameters() if n.endswith("expert_A"))
    assert shard.to_local().numel() < shard.numel()  # half of it is elsewhere
    state = adapter_state(model, CPU)
    assert not any(".base_layer." in name for name in state)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
        loaded = PeftModel.from_pretrained(tiny.llama(), folder)
        ids, mask = everything(1)
        with torch.no_grad():
            ours = loaded.eval()(input_ids=ids, attention_mask=mask).logits
            theirs = base.eval()(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(ours, theirs)
    dist.barrier()


def memory_is_as_the_formula_says() -> None:
    """Bytes of weights, gradients and moments: W + 4 A under DDP, half of that under FSDP2."""
    base = adapted(torch.float32)
    sizes: dict[bool, int] = {True: 0, False: 0}
    for value in base.parameters():
        sizes[value.requires_grad] += value.nbytes
    for name, share in (("ddp", 1), ("fsdp2", 2)):
        model = copy.deepcopy(base)
        wrapped, silent = WRAPS[name](model)
        learns = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learns, foreach=False)
        backward(wrapped, rank_batches(dist.get_rank(), 1), 1, silent)
        optimizer.step()
        held = [*wrapped.parameters(), *(p.grad for p in learns)]
        for state in optimizer.state.values():
            held += [state["exp_avg"], state["exp_avg_sq"]]
        counted = sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in held)
        assert counted == (sizes[False] + 4 * sizes[True]) // share, (name, counted, sizes)


def routing_is_summed_over_ranks() -> None:
    """Under both, accumulated and checkpointed: each rank gets the sums of one process."""
    alone = adapted(rotation="tangent")
    with record_routing(alone) as log, torch.no_grad():
        for rank in range(2):
            for number, (ids, mask) in enumerate(rank_batches(rank, 2)):
                with log.of("both" if number else f"rank {rank}"):
                    alone(input_ids=ids, attention_mask=mask)
    wanted = log.to_dict()
    for name, wrap in WRAPS.items():
        model = copy.deepcopy(alone)
        checkpointed(model, "non-reentrant")
        model.train()
        wrapped, silent = wrap(model)
        with record_routing(wrapped) as log:
            for number, (ids, mask) in enumerate(rank_batches(dist.get_rank(), 2)):
                with log.of("both" if number else f"rank {dist.get_rank()}"), silent(number == 0):
                    loss_of(wrapped, ids, mask, learnt(mask)).backward()
        assert len(log.tasks) == 2
        total = log.over_processes()
        assert sorted(total.tasks) == ["both", "rank 0", "rank 1"]
        for path, layer in total.layers.items():
            for task, sums in layer.tasks.items():
                found, theirs = as_dict(sums), wanted["layers"][path]["tasks"][task]
                for key in ("tokens", "rows", "choices", "top", "pairs"):
                    assert found[key] == theirs[key], (name, path, task, key)
                assert found["weight"] == pytest.approx(theirs["weight"])
                turns = found["rotation"]
                assert turns["absolute"] == pytest.approx(theirs["rotation"]["absolute"], rel=1e-5)
            assert torch.allclose(layer.planes_ERR, log_planes(wanted, path), rtol=1e-4)


def log_planes(content: dict[str, Any], path: str) -> Tensor:
    return torch.tensor(content["layers"][path]["planes"], dtype=torch.float64)


def ranks_agree_on_the_highest_number() -> None:
    assert highest(7 * dist.get_rank(), CPU) == 7


CHECKS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "different before, the mean after": (
        ranks_find_different_gradients_before_they_exchange_them, {},
    ),
    "an expert rests on one rank": (an_expert_is_used_on_one_rank_alone, {}),
    "a plain mean over ranks is wrong": (a_mean_over_ranks_is_not_the_mean_over_tokens, {}),
    "three updates": (sgd_steps_agree, {}),
    "old experts stay": (old_experts_stay, {}),
    "rates by load": (rates_by_load_agree, {}),
    "routing": (routing_is_summed_over_ranks, {}),
    "memory": (memory_is_as_the_formula_says, {}),
    "highest": (ranks_agree_on_the_highest_number, {}),
    "a sharded adapter is saved whole": (a_sharded_adapter_is_saved_whole, {"folder": "adapter"}),
    **{
        " ".join([wrap, *(f"{k}={v}" for k, v in more.items())]): (
            equals_one_process, {"wrap": wrap, **more},
        )
        for wrap in WRAPS
        for more in (
            {}, {"parts": 2}, {"dtype": "float32"}, {"checkpoint": "non-reentrant"},
            {"checkpoint": "reentrant"}, {"checkpoint": "non-reentrant", "parts": 2},
            {"checkpoint": "reentrant", "parts": 2}, {"dtype": "float32", "parts": 2},
            {"dtype": "float32", "checkpoint": "non-reentrant"}, {"second": (0,)}, {"only": 1},
        )
    },
}  # fmt: skip


def main(folder: str) -> None:
    """Run every check; write what went wrong, so that each can be a test of its own."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    rank = dist.get_rank()
    for number, (name, (check, arguments)) in enumerate(CHECKS.items()):
        if "folder" in arguments:
            arguments["folder"] = str(Path(folder, arguments["folder"]))
        said = "ok"
        try:
            check(**arguments)
        except Exception:
            said = traceback.format_exc()
        Path(folder, f"{number}.{rank}.txt").write_text(f"{name}\n{said}", encoding="utf-8")
        if highest(int(said != "ok"), CPU):
            dist.barrier()
