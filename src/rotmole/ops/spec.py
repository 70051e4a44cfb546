"""The vocabulary of every way to compute a layer: one Spec, one Weights, one Tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """What one adapted layer computes, but for its tensors; made once, when the layer is made.

        y = W x + scale * sum_{e in S(x)} g_e(x) * R_e(x)[A_e drop(x)] B_e
              + scale_0 * g_0(x) * R_0(x)[A_0 drop(x)] B_0      with a shared expert

    All fields but `scale` and `shared` are settings of RotMoleConfig, under the same names and with
    the same meaning; docs/reference.md describes them.

    Attributes:
        scale: s, lora_alpha / r (rsLoRA: lora_alpha / sqrt(r); GOAT: its closed form), times
            routed_scaling_factor if there is more than one expert.
        shared: of the expert that every token uses, one expert without selection; its gate g_0, if
            it has one, is a sigmoid (scoring). None: there is none.
    """

    num_experts: int = 1
    scale: float = 1.0
    top_k: int = 1
    router: str = "linear"
    router_dim: int | None = None
    router_temperature: float | None = None
    router_jitter: float = 0.0
    router_seed: int = 0
    router_bias_rate: float = 0.0
    scoring: str = "softmax"
    selection: str = "top_k"
    top_p: float = 0.5
    norm_topk_prob: bool = True
    rotation: str = "none"
    rotation_input: str = "x"
    rotation_dim: int | None = None
    rotation_metric: str = "rank"
    rotation_planes: int | None = None
    radar_rank: int | None = None
    radar_normalize: bool = True
    router_sqrt_gate: bool = False
    share_A: bool = False
    dispatch: str = "auto"
    compute_dtype: str = "adapter"
    kernels: str = "eager"
    shared: Spec | None = None
    experts_added: tuple[int, ...] = ()

    @property
    def generations(self) -> tuple[int, ...]:
        """The numbers of experts that came together: those of the start, then each growth's."""
        return (self.num_experts - sum(self.experts_added), *self.experts_added)

    @property
    def chosen(self) -> int:
        """Experts that a token uses with selection top_k: up to K of each generation."""
        return sum(min(self.top_k, count) for count in self.generations)

    @property
    def small_gates(self) -> bool:
        """Whether rotation gates read few numbers (C x, z or the logits) in place of x."""
        return self.rotation_dim is not None or self.rotation_input != "x"

    @property
    def has_plain_gate(self) -> bool:
        """Whether the scaling gate is softmax over a linear router, by top_k or dense."""
        usual = (self.router, self.scoring, self.router_jitter) == ("linear", "softmax", 0.0)
        usual = usual and self.router_bias_rate == 0 and self.router_dim is None
        usual = usual and not self.experts_added
        return usual and self.router_temperature is None and self.selection in ("top_k", "dense")


class Weights(NamedTuple):
    """The tensors of one layer.

    Attributes:
        A_ERD: [E, R, D] input factors, or [1, R, D]: one for all experts.
        B_ERO: [E, R, O] output factors.
        gates: rotation-gate parameters by name, as in rotation.table.gate_shapes.
        router: scaling-gate parameters by name, as in routing.route.scaling_gate_shapes; {}
            without one.
        bias_E: [E] added to the scores for the selection alone; None without one.
        shared: those of the shared expert, [1, ...]; its router "router_weight" [1, D] is the gate
            g_0, {} where g_0 is one. None: there is no shared expert.
    """

    A_ERD: Tensor
    B_ERO: Tensor
    gates: Mapping[str, Tensor] = {}
    router: Mapping[str, Tensor] = {}
    bias_E: Tensor | None = None
    shared: Weights | None = None

    def cast(self, spec: Spec, dtype: torch.dtype) -> Weights:
        """Return the same weights with B and all that reads drop(x) in the type of the products."""
        gates = dict(self.gates)
        for name in ["rotation_down"] if spec.small_gates else ["rotation_vector"]:
            if name in gates:
                gates[name] = gates[name].to(dtype)
        shared = self.shared
        if shared is not None and spec.shared is not None:
            shared = shared.cast(spec.shared, dtype)
        A_ERD, B_ERO = self.A_ERD.to(dtype), self.B_ERO.to(dtype)
        return self._replace(A_ERD=A_ERD, B_ERO=B_ERO, gates=gates, shared=shared)


class Tokens(NamedTuple):
    """What is known of the T tokens of a layer's input apart from the input itself.

    Attributes:
        ids_T: [T] token ids, None if they are unknown.
        mask_T: [T] True for tokens that are no padding; None: all.
        sequence_T: [T] number of each token's sequence, 0..N-1; None: the tokens are N sequences
            of T/N tokens, one after the other.
        sequences: N.
    """

    ids_T: Tensor | None = None
    mask_T: Tensor | None = None
    sequence_T: Tensor | None = None
    sequences: int = 1

    def numbers(self, count: int, device: torch.device) -> Tensor:
        """Return sequence_T, spelt out, for `count` tokens."""
        if self.sequence_T is not None:
            return self.sequence_T
        each_N = torch.arange(self.sequences, device=device)
        return each_N.repeat_interleave(count // max(self.sequences, 1))


NO_TOKENS = Tokens()
