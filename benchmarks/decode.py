"""How fast is cached greedy decoding beside LoRA's?

    python benchmarks/decode.py [--quick] [--csv FILE]

SmolLM2-135M's architecture with random weights (bfloat16 where the machine is fast at it), adapters
on q,k,v,o, a prompt of 32 tokens, then 64 tokens one by one. Both models decode token by token in
turns, so each token is one round with the same cache length. The ratio is that of tokens per
second: above 1, ours is faster. Ours is measured with kernels: compiled too; "compiled" is one
token's pass as one graph of torch.compile, with a cache of fixed size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import SHAPES, Row, finish, lora_name, model_type, parser, ratio, run, show, start
from step import AS_KERNELS, MODES, TARGETS, ours_on, pair, smollm2
from transformers import StaticCache

PROMPT, TOKENS = 32, 64
Decoder = Callable[[Any, int], Iterator[float]]


def decoder(model: Any, batch: int) -> Iterator[float]:
    """Yield the seconds of each greedily decoded token, the prompt's pass not among them."""
    ids = torch.randint(3, 500, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        while True:
            ids = out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            with torch.no_grad():
                out = model(
                    input_ids=ids,
                    past_key_values=out.past_key_values,
                    use_cache=True,
                    logits_to_keep=1,
                )
            yield time.perf_counter() - started


def compiled_decoder(model: Any, batch: int) -> Iterator[float]:
    """The same with a cache of fixed size, and the pass of one token compiled as one graph."""
    ids = torch.randint(3, 500, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + TOKENS + 2)
    step = torch.compile(model, fullgraph=True, dynamic=False)
    where = torch.arange(PROMPT)
    with torch.no_grad():
        out = model(input_ids=ids, past_key_values=cache, position_ids=where[None], use_cache=True)
        for position in range(PROMPT, PROMPT + TOKENS + 2):
            ids = out.logits[:, -1:].argmax(-1)
            at = torch.tensor([[position]])
            started = time.perf_counter()
            out = step(input_ids=ids, past_key_values=cache, position_ids=at, use_cache=True)
            yield time.perf_counter() - started


def together(
    models: dict[str, Any], batch: int, passes: int, kind: Decoder
) -> dict[str, list[float]]:
    """Decode with all models token by token, in turns forwards and backwards."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(passes):
        decoders = {name: kind(model, batch) for name, model in models.items()}
        for each in decoders.values():
            next(each)
        for token in range(TOKENS):
            for name in list(decoders)[:: 1 if token % 2 == 0 else -1]:
                times[name].append(next(decoders[name]))
    return times


def main() -> int:
    """Measure both batch sizes and modes, for the first shape (all with --full)."""
    given = parser(__doc__).parse_args()
    start(given)
    base = smollm2(given.quick)
    rows = []
    for shape in SHAPES if given.full else SHAPES[:1]:
        for mode in MODES:
            ours, lora = (model.eval() for model in pair(base, mode, shape, TARGETS["q,k,v,o"]))
            models = {"ours": ours, "lora": lora}
            names = TARGETS["q,k,v,o"]
            fast = ours_on(base, mode, shape, names, kernels="compiled").eval()
            E, R, K = shape
            for batch in (1, 16):
                case = f"q,k,v,o batch {batch} {model_type()} E={E} R={R} K={K}"
                rows.append(measured(case, mode, "tokens per second", models, batch, decoder))
                kind, some = f"{mode}, {AS_KERNELS}", models | {"ours": fast}
                rows.append(measured(case, kind, "tokens per second", some, batch, decoder))
            if not given.quick:  # the compiler takes minutes
                torch._dynamo.reset()
                case = f"q,k,v,o batch 1 {model_type()} E={E} R={R} K={K}"
                what = "compiled tokens per second"
                rows.append(measured(case, mode, what, models, 1, compiled_decoder))
            del ours, fast, lora, models
    return finish(rows, given)


def measured(
    case: str, mode: str, measure: str, models: dict[str, Any], batch: int, kind: Decoder
) -> Row:
    """Return tokens per second of ours over LoRA's: seconds of LoRA over ours."""
    found = ratio(together(models, batch, passes=1, kind=kind), "lora", "ours")
    found["ours"], found["baseline"] = found["baseline"], found["ours"]
    return show(Row("decode", case, mode, measure, lora_name(models["lora"]), **found))


if __name__ == "__main__":
    run(main)
