"""What the parity scripts share: loading one file of an original, and the table of differences.

An original is another system's own code. Each script takes the path of its checkout, copies weights
into its layer and ours, and prints the largest difference of outputs, of every gradient and of the
balance loss. This repository contains no file of an original: they are read at run time.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotmole import RotMoleConfig
from rotmole.tuner.layer import Linear

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
T, D, O, E, R = 32, 12, 14, 4, 3  # noqa: E741 - the legend's letter for out_features


def checkout(about: str) -> Path:
    """Read the checkout's path from the command line and print its commit."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("checkout", type=Path, help="folder of the original's repository")
    path: Path = parser.parse_args().checkout.resolve()
    head = subprocess.run(
        ["git", "-C", str(path), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    own = (path / ".git").exists()
    print(f"original: {path.name} at {head.stdout.strip() if own else 'an unknown commit'}")
    torch.manual_seed(0)
    return path


def isolated(package: str, root: Path, *parts: str) -> None:
    """Register empty packages in place of an original's __init__ files, which import more.

    Args:
        package: a name for the root.
        root: its folder.
        parts: subpackages, as dotted names.
    """
    for part in ("", *parts):
        name = f"{package}.{part}" if part else package
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*part.split(".")) if part else root)]
        sys.modules[name] = module


def load(name: str) -> Any:
    """Import a module of an isolated package."""
    return importlib.import_module(name)


def ours(base: nn.Module, dtype: torch.dtype = torch.float64, **settings: Any) -> Linear:
    """Make our layer around a base layer; every number is drawn at random."""
    config = RotMoleConfig(
        **({"r": R, "num_experts": E, "rotation": "none", "init_weights": False} | settings)
    )
    return Linear(base, "default", config).to(dtype)


def gradients(y: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return y and the gradient of a fixed random contraction of it for every leaf, by name."""
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((y * probe.to(y.dtype)).sum(), list(leaves.values()))
    return {"output": y.detach()} | {
        f"gradient of {name}": grad for name, grad in zip(leaves, found, strict=True)
    }


def compare(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], reasons: Mapping[str, str] = {}
) -> bool:
    """Print the largest difference of each quantity; True where all are small or explained."""
    right = True
    for name, theirs in wanted.items():
        mine = found[name].detach()
        difference = float((mine - theirs.detach().reshape(mine.shape)).abs().max())
        limit = LIMITS[theirs.dtype]
        verdict = "ok" if difference <= limit else reasons.get(name, "DIFFERS")
        right &= verdict != "DIFFERS"
        print(f"  {name:<28} {difference:9.1e}  {str(theirs.dtype)[6:]:<8} {verdict}")
    return right


def finish(right: bool) -> None:
    """End with status 0 where everything agrees or is explained."""
    sys.exit(0 if right else 1)
