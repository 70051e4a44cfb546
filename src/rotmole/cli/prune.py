"""``rotmole prune``: an adapter without the experts that its rows do not need."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rotmole.cli.screen import fact, note, progress
from rotmole.config.load import load_run, sft_arguments
from rotmole.config.schema import RunFile
from rotmole.data import Collator, data_problems, encode_all, load_examples
from rotmole.data.load import within_limit
from rotmole.errors import AdapterError, ConfigError, RotMoleError
from rotmole.evaluation.pruning import Batch, Pruned, prune
from rotmole.evaluation.render import print_table
from rotmole.evaluation.target import Target, find_target, load_target
from rotmole.files import atomic_write_text, whole_folder
from rotmole.models.load import LoadedModel
from rotmole.training.build import UNLIMITED
from rotmole.tuner.config import RotMoleConfig
from rotmole.tuner.prune import check_prunable

FIGURES = "prune.json"
MAX_DIFFERENCE = 0.01
"""Nats for each learnt token, mean over them."""


def prune_adapter(
    target: Path,
    output: Path,
    *,
    data: Path | None = None,
    limit: int | None = None,
    similarity: float | None = None,
    max_difference: float = MAX_DIFFERENCE,
    trust_remote_code: bool = False,
) -> int:
    """Write a pruned copy of a target's adapter, and print what went and what changed.

    Args:
        output: a new or empty folder; it appears complete or not at all.
        data: run file whose training rows decide; None means the target's own.
        limit: rows of each task and group; None means all.
        similarity: experts that are alike to this degree are merged; None merges none.
        max_difference: a copy whose predictions are farther from the adapter's is refused.

    Raises:
        AdapterError: there is no adapter, or it is no mixture of rotmole's.
        ConfigError: there are no rows, or the mixture cannot be pruned.
        InputError: nothing can go.
        RotMoleError: the copy is refused; nothing was written.
        StorageError: the disk refused.
    """
    place = find_target(target, needs_data=data is None)
    if place.adapter is None:
        raise AdapterError(
            f"{target} has no adapter yet, so nothing can be pruned; train it first."
        )
    run = place.run if data is None else load_run(data, data_problems=data_problems)
    if run is None:
        raise ConfigError(
            f"{target} is not in a run folder, so there are no rows to prune it by; add "
            "--data RUN.yaml."
        )
    _check(place.adapter)
    with whole_folder(output.expanduser()) as fresh:
        loaded = load_target(place, say=note, trust_remote_code=trust_remote_code)
        batches = _batches(run, place, loaded, limit)
        with progress() as show:
            pruned = prune(loaded.model, batches, fresh, similarity=similarity, progress=show)
        _show(pruned)
        names = loaded.model.active_peft_config.expert_names
        if names is not None and pruned.config.expert_names is None:
            fact("names", "gone, because not every layer keeps the same experts")
        kl = pruned.difference.kl
        if not kl <= max_difference:
            raise RotMoleError(
                f"the pruned adapter is not written: its predictions are {kl:.4f} nats from the "
                f"adapter's for each learnt token, more than --max-difference {max_difference:g}; "
                "raise that, or --similarity if experts were merged."
            )
        for file in place.adapter.iterdir():
            if file.is_file() and (file.name == "README.md" or not (fresh / file.name).exists()):
                shutil.copy2(file, fresh / file.name)
        atomic_write_text(fresh / FIGURES, json.dumps(_figures(pruned), indent=1) + "\n")
    fact("adapter", str(output))
    return 0


def _check(folder: Path) -> None:
    """Refuse what cannot be pruned before the model is loaded, which takes long."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("peft_type") != "ROTMOLE":
        raise AdapterError(
            f"{folder} is a {settings.get('peft_type')} adapter; rotmole prune takes RotMoLE's."
        )
    check_prunable(RotMoleConfig.from_pretrained(str(folder)))


def _batches(run: RunFile, place: Target, loaded: LoadedModel, limit: int | None) -> list[Batch]:
    """Return the training rows in batches, long rows together with long ones."""
    examples = load_examples(
        run.data, "train", seed=run.seed, tokenizer=loaded.tokenizer, date=place.date
    )
    chosen = []
    for task, rows in examples.items():
        groups = [row.group for row in rows]
        chosen += [rows[i] for i in within_limit(groups, limit, seed=f"{run.seed}|{task}|prune|")]
    if not chosen:
        raise ConfigError("no task has a row in its train split; give --data a run file with rows.")
    longest = sft_arguments(run)["max_length"] or UNLIMITED
    encoded = sorted(
        encode_all(chosen, loaded.tokenizer, max_length=longest),
        key=lambda row: len(row["input_ids"]),
    )
    collate, size = Collator(loaded.tokenizer), run.evaluation.batch_size
    return [collate(encoded[i : i + size]) for i in range(0, len(encoded), size)]


def _show(pruned: Pruned) -> None:
    """Print the experts of every router, then what changed."""
    print_table([["router", "experts", "unused", "merged"], *_lines(pruned)])
    before, after = pruned.parameters
    fact("parameters", f"{before:,} -> {after:,}")
    difference = pruned.difference
    fact(
        "predictions",
        f"KL {difference.kl:.2e} nats for each of {difference.tokens} learnt tokens, at most "
        f"{difference.largest_kl:.2e}; logits differ by at most {difference.logit:.2e}",
    )
    largest = max(range(len(difference.hidden)), key=lambda layer: difference.hidden[layer])
    fact(
        "layers",
        f"outputs differ by at most {difference.hidden[largest]:.2e} of their length (layer "
        f"{largest})",
    )


def _lines(pruned: Pruned) -> Sequence[list[str]]:
    return [
        [
            cut.path,
            f"{len(cut.share_E)} -> {len(cut.kept)}",
            ", ".join(map(str, cut.unused)),
            ", ".join(f"{e} into {stays}" for e, stays in cut.merged.items()),
        ]
        for cut in pruned.cuts
    ]


def _figures(pruned: Pruned) -> dict[str, object]:
    return {
        "parameters": list(pruned.parameters),
        "difference": asdict(pruned.difference),
        "routers": [asdict(cut) for cut in pruned.cuts],
    }
