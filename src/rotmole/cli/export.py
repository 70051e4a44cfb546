"""``rotmole export``: a static LoRA, an ONNX graph, a model card, an upload to a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rotmole.cli.screen import note, progress
from rotmole.errors import ConfigError, InputError, RotMoleError
from rotmole.evaluation import to_json
from rotmole.evaluation.render import footnotes, print_lines, print_table, rows
from rotmole.evaluation.target import Target, find_target, load_target
from rotmole.export.card import lora_card, onnx_card, read_scores, with_scores
from rotmole.export.hub import push
from rotmole.export.lora import MAX_KL, Settings, Verdict, export_lora
from rotmole.export.onnx_model import FILE, TOLERANCE, export_onnx
from rotmole.files import atomic_write_text, whole_folder
from rotmole.models.builtin import built_in_named
from rotmole.tuner.card import adapter_card

CARD, FIGURES = "README.md", "export.json"

MERGED = (
    "a mixture of experts cannot be merged into the base weights: which experts act, how strongly, "
    "and how far they are rotated differs from token to token. --lora --output DIR writes the "
    "nearest static LoRA, which PEFT's merge_and_unload() merges; --onnx --output DIR writes the "
    "whole adapted model."
)


@dataclass(frozen=True)
class Kinds:
    """What the user asks for.

    Attributes:
        lora, onnx, merged: what to write into the output folder.
        card: write the model card.
        push: repository on the hub, None for no upload.
        private: if the repository is new.
    """

    lora: bool = False
    onnx: bool = False
    merged: bool = False
    card: bool = False
    push: str | None = None
    private: bool = False


def export(
    target: Path,
    overrides: Sequence[str] = (),
    *,
    kinds: Kinds,
    output: Path | None = None,
    config: Path | None = None,
    rank: int | None = None,
    text: Path | None = None,
    limit: int | None = None,
    max_kl: float | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Export a target in one way, then push what was written, or the adapter itself.

    Args:
        output: a new or empty folder for the static LoRA or the ONNX graph.
        config: run file for an adapter folder.
        rank, text, limit: settings of the static LoRA; None: their defaults.
        max_kl: a static LoRA whose predictions are farther from the mixture's is refused; None:
            MAX_KL.
        force: write it all the same.

    Raises:
        ConfigError: options that contradict each other, or --merged.
        RotMoleError: the static LoRA is refused; nothing was written.
    """
    _check(kinds, output)
    of_lora = {"rank": rank, "text": text, "limit": limit, "max-kl": max_kl, "force": force or None}
    without = [f"--{name}" for name, value in of_lora.items() if value is not None]
    if without and not kinds.lora:
        raise ConfigError(f"{', '.join(without)} has no effect without --lora.")
    place = find_target(target, overrides=overrides, config=config, needs_data=kinds.lora)
    if place.adapter is None:
        raise InputError(
            f"{target} has no adapter yet, so there is nothing to export; train it first."
        )
    folder = place.adapter if output is None else output.expanduser()
    if kinds.lora:
        given = {"rank": rank, "text": text, "limit": limit}
        settings = Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type] # by name
        bound = MAX_KL if max_kl is None else max_kl
        _lora(place, folder, settings, bound, force, trust_remote_code)
    elif kinds.onnx:
        _onnx(place, folder, trust_remote_code)
    else:
        _card(place)
    if kinds.push is not None:
        _push(folder, kinds)
    return 0


def _check(kinds: Kinds, output: Path | None) -> None:
    if kinds.merged:
        raise ConfigError(f"--merged: {MERGED}")
    writes = [f"--{name}" for name in ("lora", "onnx") if getattr(kinds, name)]
    if len(writes) > 1:
        raise ConfigError("--lora and --onnx write two folders; run the command once for each.")
    if writes and output is None:
        raise ConfigError(f"{writes[0]} needs a folder to write to; add --output DIR.")
    if writes and kinds.card:
        raise ConfigError(f"--card has no effect with {writes[0]}, which writes a card of its own.")
    if not writes and output is not None:
        raise ConfigError(f"--output {output} has no effect without --lora or --onnx.")
    if kinds.private and kinds.push is None:
        raise ConfigError("--private has no effect without --push.")
    if not (writes or kinds.card or kinds.push):
        raise ConfigError("nothing to do; add --lora, --onnx, --card or --push NAME.")


def _lora(
    place: Target,
    folder: Path,
    settings: Settings,
    max_kl: float,
    force: bool,
    trust_remote_code: bool,
) -> None:
    with whole_folder(folder) as fresh:
        with progress() as show:
            verdict = export_lora(
                place, fresh, settings,
                say=note, progress=show, trust_remote_code=trust_remote_code,
            )  # fmt: skip
        _show(verdict)
        part, kl = verdict.worst
        if not kl <= max_kl and not force:
            raise RotMoleError(
                f"the static LoRA is not written: on {part} its predictions are {kl:.3f} nats "
                f"from the mixture's, more than --max-kl {max_kl:g}. A larger --rank, or --text "
                "FILE with texts like those it will read, may help; --force writes it as it is."
            )
        built_in = built_in_named(place.model.name)
        card = lora_card(_base(place), verdict, built_in=built_in.name if built_in else None)
        atomic_write_text(fresh / CARD, card)
        atomic_write_text(fresh / FIGURES, json.dumps(_figures(verdict), indent=1) + "\n")
    print(f"written: {folder} (an ordinary LoRA for PEFT; it needs no rotmole)")


def _show(verdict: Verdict) -> None:
    """Print the shares of every layer, then how far the LoRA is from the mixture."""
    print_table(list(_layer_lines(verdict)), title="share of the adapter that the LoRA explains")
    print()
    lines = [["tokens of", "tokens", "share", "linear share", "KL", "same token", "KL without"]]
    for part, share in verdict.shares.items():
        near, far = verdict.agreements.get(part), verdict.without.get(part)
        figures = ["", "", ""]
        if near is not None and far is not None:
            figures = [f"{near.kl:.4f}", f"{near.same:.3f}", f"{far.kl:.4f}"]
        lines.append(
            [part, str(share.tokens), f"{share.static:.3f}", f"{share.linear:.3f}", *figures]
        )
    print_table(lines)
    print_lines(
        [
            "share: of the power of what the adapter adds, by this LoRA; linear share: by the best "
            "linear map of any rank. The rest is what only routing and rotation can do.",
            "KL: from the mixture's predictions, nats for each token; KL without: of the base "
            "model without any adapter.",
        ]
    )
    if verdict.exact:
        print("the adapter is a LoRA: what is written computes the same.")
    if verdict.report is not None:
        print()
        print_table(rows(verdict.report))
        print_lines([f"rows of the split {verdict.split}", *footnotes(verdict.report)])


def _layer_lines(verdict: Verdict) -> Iterator[list[str]]:
    """Yield a line for each block of layers: its path, then the share of each layer in it."""
    part = list(verdict.shares)[-1]
    blocks: dict[str, dict[str, str]] = {}
    names: list[str] = []
    for path, layer in verdict.layers.items():
        block, _, name = path.rpartition(".")
        text = "exact" if layer.exact else f"{layer.shares[part].static:.3f}"
        blocks.setdefault(block, {})[name] = text
        if name not in names:
            names.append(name)
    yield [f"on {part}", *names]
    for block, cells in blocks.items():
        yield [block, *(cells.get(name, "") for name in names)]


def _figures(verdict: Verdict) -> dict[str, Any]:
    """Return everything that was measured, as values for json.dumps."""
    return {
        "rank": verdict.rank,
        "exact": verdict.exact,
        "split": verdict.split,
        "shares": {name: asdict(value) for name, value in verdict.shares.items()},
        "agreement": {name: asdict(value) for name, value in verdict.agreements.items()},
        "agreement_of_the_base": {name: asdict(value) for name, value in verdict.without.items()},
        "layers": {
            path: {name: asdict(value) for name, value in layer.shares.items()}
            for path, layer in verdict.layers.items()
        },
        "tasks": None if verdict.report is None else to_json(verdict.report),
    }


def _onnx(place: Target, folder: Path, trust_remote_code: bool) -> None:
    section = place.model.model_copy(
        update={"dtype": "float32", "device": "cpu", "device_map": None}
    )
    if section.quantization != "none":
        raise ConfigError(
            f"--onnx: model.quantization is {section.quantization}, whose layers have no ONNX "
            "form; add model.quantization=none."
        )
    wide = Target(section, place.adapter, place.run, place.folder)
    with whole_folder(folder) as fresh:
        loaded = load_target(wide, say=note, trust_remote_code=trust_remote_code)
        note("tracing the model")
        difference = export_onnx(loaded.model, fresh)
        loaded.tokenizer.save_pretrained(fresh)
        loaded.model.config.save_pretrained(fresh)
        atomic_write_text(fresh / CARD, onnx_card(_base(place), difference))
    print(f"written: {folder / FILE} (input_ids, attention_mask -> logits; no cache)")
    print(f"onnxruntime's logits differ from torch's by {difference:.1e}, at most {TOLERANCE:g}.")


def _base(place: Target) -> str:
    """Return the base model's name as others know it."""
    built_in = built_in_named(place.model.name)
    return built_in.hub_id if built_in else place.model.name


def _card(place: Target) -> None:
    """Write the card of the adapter itself, with its scores."""
    assert place.adapter is not None  # checked above
    file = place.adapter / CARD
    card = file.read_text(encoding="utf-8") if file.is_file() else adapter_card(_base(place))
    scores = read_scores(place.folder / "eval.json")
    if scores is None:
        note(f"no scores: {place.folder / 'eval.json'} is missing; `rotmole eval` writes it")
    atomic_write_text(file, with_scores(card, place.run, scores))
    print(f"written: {file}")


def _push(folder: Path, kinds: Kinds) -> None:
    assert kinds.push is not None
    done = push(folder, kinds.push, private=kinds.private, message="Upload by rotmole export")
    if done.sent:
        print(f"sent: {', '.join(done.sent)}")
    if done.kept:
        print(f"already there: {', '.join(done.kept)}")
    print(done.url)
