"""What a router may read: routers that are fitted to know the part, in place of trained gates.

A logistic regression learns from 360 labelled rows of each part which part a row is of, and its
probabilities weigh the adapters. It reads in each layer the token's own input, or the mean of the
inputs up to the token (the prefix); "shared" reads the prefix in the first layer alone, for all
layers. These routers see labels, which gates do not; they say what there is to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from parts import KINDS, LENGTH, base_model, examples, run_file, score
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from rotmole.data import Collator
from rotmole.evaluation.scoring import evaluating
from rotmole.training.build import tokenised

RIDGES = (1e-3, 1e-2, 1e-1)
TOKENS = 4000  # of all rows, for the regression of one layer
FIRST = "layers.0.self_attn.q_proj"
Fit = tuple[Tensor, Tensor]  # weight [E, D], bias [E]


class Weighted:
    """A model with all adapters active, each weighed token by token.

    Attributes:
        way: "token", "prefix" or "shared" read a fit; a number is the part whose adapter is used.
        seen: (layer, "token" or "prefix") -> inputs [N, D] and parts [N] while `recording`.
    """

    def __init__(self, base: Any, paths: Sequence[Path]) -> None:
        self.names = [f"part{number}" for number in range(len(paths))]
        self.model: Any = PeftModel.from_pretrained(base, str(paths[0]), self.names[0])
        for name, path in zip(self.names[1:], paths[1:], strict=True):
            self.model.load_adapter(str(path), name)
        self.model.base_model.set_adapter(self.names)
        self.way: str | int = 0
        self.fits: dict[str, Fit] = {}
        self.recording = False
        self.seen: dict[tuple[str, str], list[tuple[Tensor, int]]] = {}
        self.mask = self.weight = torch.empty(0)
        # PEFT calls the model's forward itself, so a hook of the whole model would not run
        base.model.register_forward_pre_hook(self._read_mask, with_kwargs=True)
        for name, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer):
                layer.register_forward_pre_hook(self._router(_place(name)))
                for number, adapter in enumerate(self.names):
                    layer.lora_B[adapter].register_forward_hook(self._weigher(number))

    def _read_mask(self, model: Any, args: Any, kwargs: Any) -> None:
        self.mask = kwargs["attention_mask"].float()[..., None]

    def _router(self, place: str) -> Any:
        def look(layer: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].float()
            prefix = (x * self.mask).cumsum(1) / self.mask.cumsum(1).clamp_min(1)
            if self.recording:
                keep = self.mask[..., 0].bool()
                for way, features in (("token", x), ("prefix", prefix)):
                    self.seen.setdefault((place, way), []).append((features[keep], int(self.way)))
            count = len(self.names)
            if isinstance(self.way, int):
                self.weight = one_hot(torch.full(x.shape[:2], self.way), count).float()
            elif self.way != "shared" or place == _place(FIRST):
                weight, bias = self.fits[place]
                features = x if self.way == "token" else prefix
                self.weight = torch.softmax(features @ weight.T + bias, -1)

        return look

    def _weigher(self, number: int) -> Any:
        return lambda layer, args, output: output * self.weight[..., number : number + 1].to(output)


def _place(name: str) -> str:
    """Name what a layer reads: q, k and v of a block read the same."""
    return (
        name.removeprefix("base_model.model.model.")
        .replace("k_proj", "q_proj")
        .replace("v_proj", "q_proj")
        .removeprefix("model.")
    )


def fit(x: Tensor, part: Tensor, count: int, ridge: float) -> Fit:
    """Fit a logistic regression on standardised inputs."""
    mean, deviation = x.mean(0), x.std(0) + 1e-4
    z = (x - mean) / deviation
    weight = torch.zeros(count, x.shape[1], requires_grad=True)
    bias = torch.zeros(count, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=25, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(z @ weight.T + bias, part) + ridge * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        scaled = weight / deviation
        return scaled.clone(), bias - scaled @ mean


@contextmanager
def recorded(weighted: Weighted) -> Iterator[None]:
    """Record what the layers read in the block."""
    weighted.recording = True
    try:
        yield
    finally:
        weighted.recording = False


def record(weighted: Weighted, tokenizer: Any, rows: Any, parts: Sequence[str]) -> list[int]:
    """Let every row go through its own adapter; return how many tokens each part has."""
    collate = Collator(tokenizer, None)
    with recorded(weighted), evaluating(weighted.model):
        for number, part in enumerate(parts):
            weighted.way = number
            chosen = [row for kind in KINDS for row in rows[f"{part}-{kind}"]]
            data = tokenised(chosen, tokenizer, LENGTH)
            for start in range(0, len(data), 24):
                batch = collate([data[i] for i in range(start, min(start + 24, len(data)))])
                weighted.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    first = weighted.seen[_place(FIRST), "token"]
    return [sum(len(x) for x, of in first if of == n) for n in range(len(parts))]


def fit_all(weighted: Weighted, way: str) -> dict[str, float]:
    """Fit a router for every place; the ridge is chosen on a quarter of the batches."""
    places = [place for place, kind in weighted.seen if kind == way]
    losses = dict.fromkeys(RIDGES, 0.0)
    chosen: dict[float, dict[str, Fit]] = {ridge: {} for ridge in RIDGES}
    for place in places:
        chunks = weighted.seen[place, way]
        halves = []
        for held in (False, True):
            some = [chunk for i, chunk in enumerate(chunks) if (i % 4 == 3) == held]
            x = torch.cat([inputs for inputs, _ in some])
            part = torch.cat([torch.full((len(inputs),), of) for inputs, of in some])
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:TOKENS]
            halves.append((x[order], part[order]))
        (x, part), (new_x, new_part) = halves
        for ridge in RIDGES:
            weight, bias = chosen[ridge][place] = fit(x, part, len(weighted.names), ridge)
            losses[ridge] += float(cross_entropy(new_x @ weight.T + bias, new_part)) / len(places)
    best = min(losses, key=lambda ridge: losses[ridge])
    weighted.fits = chosen[best]
    return {"ridge": best, "held_out_loss_of_the_router": losses[best]}


def routing(place: Any, group: Sequence[str], seed: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the figures of every way, on validation rows.

    Args:
        place: name of a cell -> its folder.
    """
    run = run_file(group, folder, seed, 1, rows=360)
    base = base_model(run)
    rows = examples(run, base.tokenizer)
    weighted = Weighted(base.model, [place(part) / "adapter" for part in group])
    record(weighted, base.tokenizer, rows["train"], group)
    for way in ("token", "prefix", "shared"):
        found = {} if way == "shared" else fit_all(weighted, way)
        weighted.way = way
        nll = score(weighted.model, base.tokenizer, rows["validation"], group)
        yield way, {"nll": nll, **found}
