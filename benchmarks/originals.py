"""Layers of other systems, loaded from their own unmodified files at named commits.

This repository contains none of their files: `peers.py --originals DIR` reads checkouts, DIR/<name
of the repository>, at run time. If the package of a file imports too much, the file is loaded with
empty packages instead of its __init__ files. Each function returns the layer around a base layer,
with our weights copied into it. If its routing is not one of ours, it also returns the weights
[T, E] that the layer gives its experts for a given x.
"""

from __future__ import annotations

import enum
import importlib
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COMMITS = {
    "AdaMoLE": "5e8599a7ad6fafde03aaad8466f583f5f28c22ac",
    "GOAT-PEFT": "ef4d21a41682bcf3b808f9273ace16cccfc7c648",
    "HydraLoRA": "afb693bc12386b96431636a27168c9f656437638",
    "MoELoRA_Riemannian": "e5c69a0050f3365b2e97343009904a8bd9437eca",
}
WHERE = {
    "AdaMoLE": "github.com/zefang-liu/AdaMoLE",
    "GOAT-PEFT": "github.com/Facico/GOAT-PEFT",
    "HydraLoRA": "github.com/Clin0212/HydraLoRA",
    "MoELoRA_Riemannian": "github.com/THUDM/MoELoRA_Riemannian",
}


def checkout(folder: Path | None, name: str) -> Path | None:
    """Return the folder of a checkout, or None after a line that says why not."""
    wanted = f"{WHERE[name]} at {COMMITS[name][:12]}"
    path = None if folder is None else folder / name
    if path is None or not path.is_dir():
        print(f"skipped: {name}; give --originals a folder that holds {name}/, {wanted}")
        return None
    if (path / ".git").exists():
        command = ["git", "-C", str(path), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if head != COMMITS[name]:
            print(f"note: {name} is at {head[:12]}, not {wanted}")
    else:
        print(f"note: {name} has no .git, so its commit is not known; wanted: {wanted}")
    return path


def isolated(package: str, root: Path, *parts: str) -> None:
    """Register empty packages in place of __init__ files, which import more than a layer needs."""
    for part in ("", *parts):
        name = f"{package}.{part}" if part else package
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*part.split(".")) if part else root)]
        sys.modules[name] = module


def _copy(own: Any, theirs_A: list, theirs_B: list, router: Tensor | None) -> None:
    with torch.no_grad():
        for e, (A, B) in enumerate(zip(theirs_A, theirs_B, strict=True)):
            A.weight.copy_(own.expert_A[e])
            B.weight.copy_(own.expert_B[e].T)
        if router is not None:
            router.copy_(own.router_weight)


def adamole(path: Path, own: Any, base: nn.Linear) -> nn.Module:
    """AdaMoLE (arXiv 2405.00361): an expert is used where its probability passes a threshold."""
    isolated("adamole_files", path / "src", "lora", "mole", "adamole")
    lora = importlib.import_module("adamole_files.lora")
    lora.LoraLayer = importlib.import_module("adamole_files.lora.layer").LoraLayer
    kind = importlib.import_module("adamole_files.adamole.layer").LinearAdaMoleLayer
    E, R, _ = own.expert_A.shape
    layer = kind(base, "default", lora_rank=R, lora_alpha=R * own.spec.scale, num_experts=E)
    gate = layer.lora_gating["default"].weight
    _copy(own, layer.lora_A["default"], layer.lora_B["default"], gate)
    return layer


def adamole_weights(layer: nn.Module, x_TD: Tensor) -> Tensor:
    """Return max(p - tau, 0) over its sum, tau = sigmoid(w x + b) / E."""
    p_TE = torch.softmax(layer.lora_gating["default"](x_TD), -1)
    tau_T1 = torch.sigmoid(layer.lora_threshold["default"](x_TD)) / p_TE.shape[-1]
    over_TE = torch.relu(p_TE - tau_T1)
    return over_TE / over_TE.sum(-1, keepdim=True).clamp_min(1e-30)


def goat(path: Path, own: Any, base: nn.Linear) -> nn.Module:
    """GOAT (arXiv 2502.16894), its top-k layer with LoRA's own start."""
    isolated("goat_files", path / "goat" / "peta" / "src" / "goat")
    kind = importlib.import_module("goat_files.layer").LinearGOATLayer
    E, R, _ = own.expert_A.shape
    layer = kind(base, "default", lora_rank=R * E, lora_alpha=R * own.spec.scale, num_experts=E,
                 top_k=own.spec.top_k, init_type="mole")  # fmt: skip
    gate = layer.lora_gating["default"].weight
    _copy(own, layer.lora_A["default"], layer.lora_B["default"], gate)
    return layer


@dataclass
class _Config:
    """Stand-in for HydraLoRA's copy of PeftConfig."""


class _First(nn.Module):
    """A layer whose forward pass also returns its balance loss."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def hydralora(path: Path, own: Any, base: nn.Linear) -> nn.Module:
    """HydraLoRA (arXiv 2404.19245): one A, a softmax over every B."""
    isolated("hydralora_files", path / "HydraLoRA" / "peft", "utils", "tuners")
    utils = importlib.import_module("hydralora_files.utils")
    utils.PeftConfig = _Config
    utils.PeftType = enum.Enum("PeftType", "LORA")
    utils.transpose = lambda weight, fan_in_fan_out: weight.T if fan_in_fan_out else weight
    kind = importlib.import_module("hydralora_files.tuners.lora").Linear
    E, R, D = own.expert_A.shape
    layer = kind(D, base.out_features, r=R, lora_alpha=R * own.spec.scale, lora_nums=E, bias=False)
    layer = layer.to(base.weight.dtype)
    layer.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
    with torch.no_grad():
        own.expert_A.copy_(own.expert_A[:1].expand_as(own.expert_A))
        layer.lora_A.weight.copy_(own.expert_A[0])
        layer.lora_route.weight.copy_(own.router_weight)
        for e in range(E):
            getattr(layer, f"lora_B{e}").weight.copy_(own.expert_B[e].T)
    return _First(layer)


def riemannian(path: Path, own: Any, base: nn.Linear) -> nn.Module:
    """Riemannian MoE-LoRA (arXiv 2502.15828): every expert is computed, K are weighed."""
    from peft import LoraConfig, get_peft_model

    isolated("riemannian_files", path)
    kind = importlib.import_module("riemannian_files.moe_lora").MoELoRA
    E, R, _ = own.expert_A.shape
    config = LoraConfig(r=R, lora_alpha=R * own.spec.scale, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(base), config).base_model.model[0]
    layer.__class__ = kind  # as its training scripts do
    layer.set_moe(number_experts=E, top_k=own.spec.top_k)
    layer.descent_strategy = "riemannian"
    layer.to(base.weight.dtype)
    _copy(own, layer.lora_A, layer.lora_B, layer.gate.weight)
    return layer


class Arrow(nn.Module):
    """PEFT's own Arrow: similarity to each expert's first singular vector selects K of them."""

    def __init__(self, own: Any, base: nn.Linear) -> None:
        from peft import ArrowConfig
        from peft.tuners.lora.arrow import ArrowLoraLinearLayer

        super().__init__()
        self.base = base
        E, R, D = own.expert_A.shape
        names = [f"task_{e}" for e in range(E)]
        config = ArrowConfig(top_k=own.spec.top_k)
        config.task_adapter_names = names
        self.arrow = ArrowLoraLinearLayer(D, config)
        self.A = nn.ModuleDict({name: nn.Linear(D, R, bias=False) for name in names})
        self.B = nn.ModuleDict({n: nn.Linear(R, base.out_features, bias=False) for n in names})
        self.to(base.weight.dtype)
        _copy(own, list(self.A.values()), list(self.B.values()), None)
        self.scaling = dict.fromkeys(names, own.spec.scale)
        self.arrow.build_prototypes(self.A, self.B)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.arrow(x, self.A, self.B, nn.Identity(), self.scaling)


def arrow_weights(layer: Arrow, x_TD: Tensor) -> Tensor:
    """Return the softmax of the K largest |<x, prototype>| over the temperature."""
    score_TE = (x_TD @ layer.arrow.prototypes.T).abs()
    best = torch.topk(score_TE, layer.arrow.top_k, dim=-1)
    kept = torch.full_like(score_TE, -torch.inf).scatter(-1, best.indices, best.values)
    return torch.softmax(kept / layer.arrow.temperature, -1)
