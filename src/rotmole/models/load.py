"""Loading a base model and its tokenizer: hub id, local folder, GGUF file or built-in name."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model

from rotmole.config.schema import ModelSection
from rotmole.errors import ConfigError, ModelError, RotMoleError
from rotmole.models.builtin import (
    BUILT_IN,
    BuiltIn,
    built_in_folder,
    built_in_named,
    fetch_built_in,
)
from rotmole.models.gguf import check_gguf, gguf_arguments, make_ordinary
from rotmole.models.limits import check_vocabulary
from rotmole.models.precision import (
    choose_device,
    choose_dtype,
    quantization_config,
)
from rotmole.tuner.targets import keep_trainable

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|Cannot allocate memory", re.I)


@dataclass
class LoadedModel:
    """A base model ready for an adapter.

    Attributes:
        model: the transformers model, in eval mode, on its device.
        tokenizer: its tokenizer, with a padding token.
        name: the name in the run file.
        note: one line to be shown with every figure of this model, or None.
    """

    model: Any
    tokenizer: Any
    name: str
    note: str | None = None


@dataclass(frozen=True)
class _Source:
    location: str
    gguf: Path | None = None
    built_in: BuiltIn | None = None


def load_model(
    section: ModelSection,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = logger.info,
) -> LoadedModel:
    """Load the model of the run file's `model:` section, and its tokenizer.

    Args:
        trust_remote_code: let transformers run code that came with the model.
        say: called with one line before each slow step (download and conversion of a built-in
            model).

    Raises:
        ModelError: the model cannot be found, read or used, or a weight is not in the file.
        ConfigError: a package is missing.
    """
    device = choose_device(section)
    dtype = choose_dtype(section, device)
    quantization = quantization_config(section, dtype)
    source = _resolve(section.name)
    if source.gguf and quantization is not None:
        raise ModelError(
            f"model.quantization: {section.quantization} cannot be used with the GGUF file "
            f"{section.name!r}; use quantization: none, or a folder with safetensors."
        )
    if source.built_in:
        fetch_built_in(source.built_in, say)
    tokenizer = load_tokenizer(section, trust_remote_code=trust_remote_code)
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": section.device_map}
    if quantization is not None:
        arguments["quantization_config"] = quantization
        arguments["device_map"] = section.device_map or {"": str(device)}
    if section.attn_implementation:
        arguments["attn_implementation"] = section.attn_implementation
    model = _pretrained(section, source, arguments, trust_remote_code)
    keep_trainable(model)
    if source.gguf:
        make_ordinary(model)
    if arguments["device_map"] is None:
        model.to(device)
    check_vocabulary(model, tokenizer, section.name)
    for config in (model.config, model.generation_config):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    if source.built_in:  # saved adapters name their base so, see models/adapter.py
        model.name_or_path = source.built_in.hub_id
    note = source.built_in.note if source.built_in else None
    return LoadedModel(model, tokenizer, section.name, note)


def load_tokenizer(section: ModelSection, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer alone; its vocabulary is never changed.

    If it has no padding token, the end-of-sequence token is used, which is safe because the
    attention mask marks the padding.

    Raises:
        ModelError: the tokenizer cannot be found or read, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    source = _resolve(section.name)
    if source.built_in:
        fetch_built_in(source.built_in)
    arguments = _shared_arguments(section, trust_remote_code)
    if source.gguf:
        arguments["gguf_file"] = source.gguf.name
    with _loading_errors(section, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **arguments)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.name {section.name!r}: its tokenizer has no end-of-sequence token, so no "
            "answer could end; set eos_token in tokenizer_config.json or choose another model."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(section: ModelSection, *, trust_remote_code: bool = False) -> Any:
    """Load the transformers configuration alone; for the built-in model nothing is downloaded.

    Raises:
        ModelError: the configuration cannot be found or read.
    """
    from transformers import AutoConfig

    source = _resolve(section.name)
    if source.built_in and not built_in_folder(source.built_in).is_dir():
        return AutoConfig.for_model(**source.built_in.architecture)
    arguments = _shared_arguments(section, trust_remote_code)
    if source.gguf:
        arguments["gguf_file"] = source.gguf.name
    with _loading_errors(section, "configuration"):
        return AutoConfig.from_pretrained(source.location, **arguments)


def empty_model(
    section: ModelSection, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> Any:
    """Build a causal language model on the meta device: names and shapes, but no weights.

    Args:
        dtype: of the parameters.

    Raises:
        ModelError: the configuration cannot be read or does not describe a causal language model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(section, trust_remote_code=trust_remote_code)
    with _loading_errors(section, "model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model


def adapt(base: Any, config: PeftConfig) -> Any:
    """Put a new adapter of any PEFT method into a base model.

    Args:
        base: the model; it is changed.
        config: the adapter's configuration; the model gets a copy, because PEFT changes it.

    Returns:
        The PeftModel.

    Raises:
        ConfigError, ModelError: the adapter does not fit the model; PEFT's own refusals, which
            are of many types, are a ConfigError too.
    """
    try:
        return get_peft_model(base, copy.deepcopy(config))
    except RotMoleError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"adapter: {' '.join(str(error).split())}") from error


def has_weights(section: ModelSection) -> bool:
    """Tell whether a model can be loaded: False for a folder that holds a configuration alone."""
    source = _resolve(section.name)
    folder = Path(source.location)
    if source.built_in or source.gguf or not folder.is_dir():
        return True  # elsewhere: loading finds out
    return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())


def _resolve(name: str) -> _Source:
    built_in = built_in_named(name)
    if built_in:
        return _Source(str(built_in_folder(built_in)), built_in=built_in)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        check_gguf(path)
        return _Source(str(path.parent), gguf=path)
    if path.is_dir():
        _check_folder(path, name)
        return _Source(str(path))
    if path.is_file():
        raise ModelError(
            f"model.name {name!r} is a file; give the folder that contains config.json, or a file "
            "whose name ends in .gguf."
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(
            f"model.name {name!r}: there is no such folder (relative to {Path.cwd()}); check the "
            f"path, or use a hub id such as org/name, or a built-in name ({', '.join(BUILT_IN)})."
        )
    return _Source(name)


def _check_folder(path: Path, name: str) -> None:
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"model.name {name!r} is an adapter, not a model; set model.name to its base model."
        )
    files = sorted(path.glob("*.gguf"))
    hint = f"; set model.name to the file {str(files[0])!r}" if files else ""
    raise ModelError(
        f"model.name {name!r}: not a model folder, because it has no config.json{hint}."
    )


def _shared_arguments(section: ModelSection, trust_remote_code: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if section.revision:
        arguments["revision"] = section.revision
    return arguments


def _pretrained(
    section: ModelSection, source: _Source, arguments: dict[str, Any], trust_remote_code: bool
) -> Any:
    from transformers import AutoModelForCausalLM

    arguments = {**_shared_arguments(section, trust_remote_code), **arguments}
    if source.gguf:
        arguments |= gguf_arguments(source.gguf)
    with _loading_errors(section, "model"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source.location, output_loading_info=True, **arguments
        )
    missing = sorted(report["missing_keys"])
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"model.name {section.name!r}: its files lack {len(missing)} tensors that a causal "
            f"language model needs ({some}), which would get random values; choose a complete "
            "model."
        )
    return model


@contextmanager
def _loading_errors(section: ModelSection, what: str) -> Iterator[None]:
    """Turn every error of the block into a ModelError; `what` is loaded by the block."""
    try:
        yield
    except RotMoleError:
        raise
    except Exception as error:  # transformers raises errors of many classes
        raise ModelError(explain(error, section, what)) from error


def explain(error: Exception, section: ModelSection, what: str) -> str:
    """Return one sentence that says why loading failed and what to do.

    Args:
        error: raised by transformers, safetensors or huggingface_hub.
        what: "model", "tokenizer" or "configuration".
    """
    name, text = section.name, " ".join(str(error).split())
    head = f"model.name {name!r}: the {what} cannot be loaded"
    short = text if len(text) <= 300 else text[:297] + "..."
    if isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(text):
        return f"{head}: not enough memory; choose a smaller model, dtype bfloat16 or quantization."
    if "trust_remote_code" in text:
        return (
            f"{head}: it needs Python code from its own files, which is not run unless you add "
            "--trust-remote-code to the command; read that code first."
        )
    if Path(name).expanduser().exists() or built_in_named(name):
        return (
            f"{head}: its files are broken, incomplete or of an unknown kind ({short}); download "
            "it again or choose another model."
        )
    if "gated" in text.lower() or "401" in text or "403" in text:
        return f"{head}: the hub requires permission; accept the model's terms there and log in."
    return (
        f"{head}: it is not on the hub, or the hub cannot be reached ({short}). Check the spelling "
        "and the network (and whether HF_HUB_OFFLINE is set), download it beforehand, or set "
        f"model.name to a local folder or a built-in name ({', '.join(BUILT_IN)})."
    )
