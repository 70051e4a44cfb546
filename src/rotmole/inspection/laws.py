"""Laws that every adapter should keep: what a row's output may not depend on, measured.

Training, batched evaluation, cached generation and serving all assume that a row's output is a
function of the row. An adapter of any PEFT method can break that without an error.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rotmole.errors import AdapterError
from rotmole.evaluation.scoring import evaluating
from rotmole.evaluation.target import with_adapter
from rotmole.inspection.measures import MEASURES, NEW, PADS, all_logits, difference, disabled_logits
from rotmole.models.limits import window_of

SETS, ROWS, LENGTH = 3, 4, 24
"""Sets of rows, rows of a set, and tokens of a row."""

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""What rounding may change, by the number format of the model, in the unit of `Finding`."""
BASE_FACTOR = 4
"""The tolerance is at least this many times what the base model shows without an adapter."""


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        name: of what the output may not depend on.
        broken: what it means if it does, one sentence.
        exact: whether every bit must be equal, because the same computation is made twice.
    """

    name: str
    broken: str
    exact: bool = False


LAWS = (
    Law(
        "other rows",
        "a row's output depends on the rows beside it in the batch, so scores change with the "
        "batch size and one user of a server changes the answers of another",
    ),
    Law(
        "padding left",
        "padding before a row changes its output, so answers that are generated in batches differ "
        "from those that are generated one by one",
    ),
    Law(
        "padding right",
        "padding after a row changes its output, so training and scoring depend on how rows of "
        "different lengths are put together",
    ),
    Law(
        "cache",
        "generating with the cache of keys and values gives other logits than computing the whole "
        "text anew, so what is generated is not what was trained or scored",
    ),
    Law(
        "later tokens",
        "the output at a token depends on tokens after it, which are there in training and are "
        "not there in generation, so losses and scores may be too good",
    ),
    Law(
        "training mode",
        "a forward pass in training mode changes what eval mode computes afterwards, so figures "
        "depend on what was run before",
        exact=True,
    ),
    Law(
        "earlier calls",
        "the same row gives another output after other calls (a batch, a generation, a call with "
        "the adapter disabled), so figures depend on what was run before",
        exact=True,
    ),
    Law(
        "disabled",
        "with the adapter disabled, the model is not the base model to the last bit, so a "
        "comparison with the base and a KL penalty to it are wrong",
        exact=True,
    ),
    Law(
        "reload",
        "the adapter that is saved and loaded again computes something else, so what is shared is "
        "not what was trained",
        exact=True,
    ),
)
"""The laws, in the order in which they are tested."""


@dataclass(frozen=True)
class Finding:
    """What was measured for one law.

    Differences are the largest change of a logit, in standard deviations of the row's logits.

    Attributes:
        law: that was tested.
        difference: with the adapter: the median over `SETS` sets of rows, or for an exact law
            the largest; None if the model ended in an error.
        base: the same without the adapter; 0 where the base has no such figure.
        tolerance: the largest difference that keeps the law.
        error: what the model raised, one sentence; "" if nothing.
    """

    law: Law
    difference: float | None
    base: float
    tolerance: float
    error: str = ""

    @property
    def kept(self) -> bool:
        """Whether the law is kept; a difference that is not a number keeps none."""
        return self.difference is not None and self.difference <= self.tolerance


@dataclass(frozen=True)
class Report:
    """What was found for all laws.

    Attributes:
        findings: one for each law.
        effect: the largest change of a logit by the adapter, in the unit of `Finding`.
        dtype: number format of the base model.
        device: of the base model.
    """

    findings: tuple[Finding, ...]
    effect: float
    dtype: torch.dtype
    device: torch.device

    @property
    def seen(self) -> bool:
        """Whether the adapter changes the output enough for a fault of it to be seen."""
        return not self.effect <= TOLERANCE[self.dtype]


Adapt = Callable[[Any, Path], Any]
T = TypeVar("T")


def check_laws(
    load: Callable[[], Any],
    adapter: Path,
    *,
    adapt: Adapt = with_adapter,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Measure every law on an adapter of any PEFT method and its base model.

    Rows are random tokens, the same in every call. A law that holds up to rounding is judged by
    the median over three sets of rows: where two experts score the same to the last digits,
    rounding decides between them, and that single row is no fault of the adapter.

    Args:
        load: returns the base model, a causal language model; called twice, the second time after
            the first model is gone.
        adapter: folder of the adapter.
        adapt: puts the adapter of a folder on a base model, in place, and returns the PeftModel.
        say: told what is done before each slow step.

    Raises:
        AdapterError: the adapter does not fit the base.
    """
    tell = say or (lambda text: None)
    with tempfile.TemporaryDirectory() as folder:
        first = _first_model(load, adapter, adapt, Path(folder), tell)
        gc.collect()  # two base models may be more than the memory holds
        again, error = None, first.error
        if not error:
            tell("reload")
            again, error = _guarded(lambda: _reloaded(load, adapt, Path(folder), first.sets))
    findings = dict(first.findings)
    findings["reload"] = _finding("reload", _largest(first.trained, again), first.dtype, error)
    effect = _largest(first.plain, first.trained) or 0.0
    return Report(tuple(findings[law.name] for law in LAWS), effect, first.dtype, first.device)


@dataclass(frozen=True)
class _First:
    """What the first model gave: it is gone before the second is loaded.

    Attributes:
        sets: of rows.
        plain, trained: logits of each set without and with the adapter; None after an error.
        findings: name -> of all laws that need no second model.
        error: that kept the adapter from being used or saved.
    """

    sets: list[Tensor]
    plain: list[Tensor]
    trained: list[Tensor] | None
    findings: dict[str, Finding]
    error: str
    dtype: torch.dtype
    device: torch.device


def _first_model(
    load: Callable[[], Any], adapter: Path, adapt: Adapt, folder: Path, tell: Callable[[str], None]
) -> _First:
    """Measure the base model, then the same with the adapter, which is saved into a folder."""
    base = load()
    dtype, device = base.dtype, base.device
    if dtype not in TOLERANCE:
        formats = ", ".join(str(known).removeprefix("torch.") for known in TOLERANCE)
        raise AdapterError(f"laws: the base model is in {dtype}; tolerances are of {formats}.")
    sets = _rows(base)
    with evaluating(base):
        tell("base model alone")
        of_base = {name: _measured(name, base, sets)[0] or 0.0 for name in MEASURES}
        plain = all_logits(base, sets)
    model = adapt(base, adapter)
    findings = {}
    with evaluating(model):
        # first of all: what other calls may leave behind is a law of its own
        trained, error = _guarded(lambda: all_logits(model, sets))
        disabled, fault = _guarded(lambda: disabled_logits(model, sets))
        findings["disabled"] = _finding("disabled", _largest(plain, disabled), dtype, fault)
        for name in MEASURES:
            tell(name)
            value, fault = _measured(name, model, sets)
            findings[name] = _finding(name, value, dtype, fault, base=of_base[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a copy that nobody keeps
        _, unsaved = _guarded(lambda: model.save_pretrained(folder))
    return _First(sets, plain, trained, findings, error or unsaved, dtype, device)


def _rows(base: Any) -> list[Tensor]:
    """Return sets of rows [ROWS, T] of random tokens without special ones."""
    config = base.config.get_text_config()
    window = window_of(base)
    longest = LENGTH if window is None else min(LENGTH, window.positions - PADS - NEW)
    if longest < 4:
        raise AdapterError(
            f"laws: the base model reads {longest + PADS + NEW} tokens; the test needs rows of at "
            f"least {4 + PADS + NEW}."
        )
    special = {config.pad_token_id, config.bos_token_id}
    ends = config.eos_token_id
    special |= set(ends) if isinstance(ends, list) else {ends}
    ordinary = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    generator = torch.Generator().manual_seed(0)
    return [
        ordinary[torch.randint(len(ordinary), (ROWS, longest), generator=generator)].to(base.device)
        for _ in range(SETS)
    ]


def _measured(name: str, model: Any, sets: list[Tensor]) -> tuple[float | None, str]:
    """Return the difference of a law over all sets, and the error that stopped it."""
    differences, error = _guarded(lambda: [MEASURES[name](model, ids_BT) for ids_BT in sets])
    if differences is None:
        return None, error
    return (max(differences) if _named(name).exact else statistics.median(differences)), ""


def _finding(
    name: str, difference: float | None, dtype: torch.dtype, error: str, *, base: float = 0.0
) -> Finding:
    law = _named(name)
    tolerance = 0.0 if law.exact else TOLERANCE[dtype]
    return Finding(law, difference, base, max(tolerance, BASE_FACTOR * base), error)


def _named(name: str) -> Law:
    return next(law for law in LAWS if law.name == name)


def _largest(first: list[Tensor] | None, second: list[Tensor] | None) -> float | None:
    if first is None or second is None:
        return None
    return max(difference(a, b) for a, b in zip(first, second, strict=True))


def _reloaded(
    load: Callable[[], Any], adapt: Adapt, folder: Path, sets: list[Tensor]
) -> list[Tensor]:
    model = adapt(load(), folder)
    with evaluating(model):
        return all_logits(model, sets)


def _guarded(work: Callable[[], T]) -> tuple[T | None, str]:
    """Do the work, and return its result or what it raised in one sentence."""
    try:
        return work(), ""
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the code of any PEFT method runs here
        short = " ".join(str(error).split())[:120]
        return None, f"{type(error).__name__}: {short}"
