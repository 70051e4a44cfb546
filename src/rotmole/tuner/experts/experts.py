"""Experts: the parameters of one adapter in one layer, and their roles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rotmole.ops.precision import at_least_float32
from rotmole.ops.rotation.table import ROTATIONS, gate_shapes
from rotmole.ops.routing.route import scaling_gate_shapes
from rotmole.ops.spec import Spec, Weights
from rotmole.tuner.batch.loads import LoadCount
from rotmole.tuner.batch.losses import LossWeights
from rotmole.tuner.experts.generations import joined, pieces_of

if TYPE_CHECKING:
    from rotmole.tuner.settings.settings import Settings

EXPERT, SCALING_GATE, ROTATION_GATE = "expert", "scaling_gate", "rotation_gate"

SHARED = "shared_"
SHARED_PLAIN = frozenset({"shared_A", "shared_B", "shared_gate"})
"""Parameters of the shared expert that belong to no rotation gate."""

ROW_BY_ROW = (
    "expert_A", "expert_B", "rotation_vector", "rotation_angle", "rotation_center",
)  # fmt: skip
"""Parameters whose row e only the tokens that chose expert e reach."""

FROZEN = {
    "none": frozenset[str](),
    "A": frozenset({"expert_A"}),
    "AB": frozenset({"expert_A", "expert_B"}),
}
"""The parameters that the setting `frozen` keeps from being trained."""


def spec_of(settings: Settings, in_features: int) -> Spec:
    """Return what a layer with these settings computes: equal names, and the scale worked out.

    scale = lora_alpha / r, or lora_alpha / sqrt(r), or GOAT's closed form sqrt(3 eta D / r);
    times routed_scaling_factor where experts are selected
    """
    if settings.goat_eta is not None:
        scale = math.sqrt(3 * settings.goat_eta * in_features / settings.r)
    else:
        scale = settings.lora_alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)
    made = ("scale", "shared", "experts_added")
    names = [entry.name for entry in fields(Spec) if entry.name not in made]
    chosen = {name: getattr(settings, name) for name in names}
    shared, added = _shared_spec(settings, scale), tuple(settings.experts_added)
    scale = scale * routed_factor(settings)
    return Spec(scale=scale, shared=shared, experts_added=added, **chosen)


def routed_factor(settings: Settings) -> float:
    """Return what the scale of a layer is multiplied by: 1 for an expert that nobody selects."""
    return settings.routed_scaling_factor if settings.num_experts > 1 else 1.0


def _shared_spec(settings: Settings, scale: float) -> Spec | None:
    """Return what the shared expert computes, None if there is none.

    routed_scaling_factor does not multiply its scale. Its gates read what those of the other
    experts do, and keep the same length if they can.
    """
    rank, alpha = settings.shared_expert_r, settings.shared_expert_alpha
    if rank == 0:
        return None
    if alpha is not None:
        scale = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
    row = ROTATIONS[settings.shared_expert_rotation]
    return Spec(
        scale=scale,
        scoring="sigmoid",
        selection="dense",
        norm_topk_prob=False,
        rotation=row.name,
        rotation_input=settings.rotation_input if row.linear_gates else "x",
        rotation_dim=settings.rotation_dim if row.linear_gates else None,
        rotation_metric=settings.rotation_metric if row.metric else "rank",
        rotation_planes=settings.rotation_planes,
        radar_rank=settings.radar_rank,
        radar_normalize=settings.radar_normalize,
        compute_dtype=settings.compute_dtype,
        kernels=settings.kernels,
    )


def _gate_shapes(spec: Spec, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return gate_shapes(
        spec.rotation,
        E=spec.num_experts,
        R=rank,
        D=inputs,
        O=outputs,
        rotation_input=spec.rotation_input,
        rotation_dim=spec.rotation_dim,
        rotation_planes=spec.rotation_planes,
        radar_rank=spec.radar_rank,
    )


class Experts(nn.Module):
    """All parameters of one adapter in one layer.

    Parameters (E experts, R rank, D in_features, O out_features):
        expert_A: [E, R, D], or [1, R, D] if all experts share it;  expert_B: [E, R, O];
        names that end in _1, _2 ...: what each growth added to the parameter of that name;
        router_*: those of the scaling gate, absent at E = 1; residual_A, residual_B: the start of
        A and B, with init_weights "svd"; and the rotation gate's, as in rotmole.ops.gate_shapes.
        shared_*: those of the shared expert, if there is one: A [1, R_0, D], B [1, R_0, O], gate
        [1, D], and its rotation gate's.

    Attributes:
        loads: choices since the bias moved, with router_bias_rate.
        choices: choices since the last optimizer step, if rotmole.optim.ExpertRates asks for them.

    Args:
        settings: of the module, all patterns applied.
        spec: from `spec_of`.
        in_features, out_features: D and O.
        has_router: False in the layers of a block-routed block that follow its first one.
    """

    expert_A: nn.Parameter
    expert_B: nn.Parameter
    residual_A: nn.Parameter
    residual_B: nn.Parameter
    shared_A: nn.Parameter
    shared_B: nn.Parameter
    router_bias: Tensor | None

    def __init__(
        self,
        settings: Settings,
        spec: Spec,
        *,
        in_features: int,
        out_features: int,
        has_router: bool = True,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.loss_weights = LossWeights()
        self.loads = LoadCount(settings.router_bias_rate)
        self.choices: LoadCount | None = None
        experts, rank = spec.num_experts, settings.r
        self.has_router = has_router and experts > 1

        def shapes_of(count: int) -> dict[str, tuple[int, ...]]:
            """Return name and shape of each parameter of as many routed experts."""
            counted = replace(spec, num_experts=count)
            shapes: dict[str, tuple[int, ...]] = {
                "expert_A": (1 if spec.share_A else count, rank, in_features)
            }
            if self.has_router and count > 1:
                shapes |= scaling_gate_shapes(counted, in_features)
            shapes["expert_B"] = (count, rank, out_features)
            return shapes | _gate_shapes(counted, rank, in_features, out_features)

        self.pieces = pieces_of(spec.generations, shapes_of)
        routers = scaling_gate_shapes(spec, in_features) if self.has_router else {}
        self.router_names = tuple(routers)
        self.gate_names = tuple(_gate_shapes(spec, rank, in_features, out_features))
        shapes = {name: piece.shape for name, piece in self.pieces.items()}
        shared: dict[str, tuple[int, ...]] = {}
        if spec.shared is not None:
            low = settings.shared_expert_r
            shared = {"shared_A": (1, low, in_features), "shared_B": (1, low, out_features)}
            if settings.shared_expert_gate:
                shared["shared_gate"] = (1, in_features)
            for name, shape in _gate_shapes(spec.shared, low, in_features, out_features).items():
                shared[SHARED + name] = shape
        self.shared_names = tuple(shared)
        residual = {}
        if settings.init_weights == "svd":
            residual = {"residual_A": shapes["expert_A"], "residual_B": shapes["expert_B"]}
        self.frozen = self._frozen(settings) | residual.keys()
        for name, shape in (shapes | shared | residual).items():
            learns = name not in self.frozen
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=learns))
        keeps = "router" in settings.freeze_old
        self.kept_biases = sum(spec.generations[:-1]) if keeps else 0
        biased = self.has_router and settings.router_bias_rate > 0
        self.register_buffer("router_bias", torch.zeros(experts) if biased else None)

    @property
    def weight(self) -> Tensor:
        """One parameter, by which PEFT's FSDP policy knows this module holds weights."""
        return self.expert_B

    @property
    def first_router_parameter(self) -> Tensor | None:
        """One parameter of the scaling gate, by which to know whether it learns; None without."""
        named = [name for name in self.pieces if self.whole_name(name) in self.router_names]
        parameters = [getattr(self, name) for name in named]
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        return next(iter(learning or parameters), None)

    @property
    def newest_B(self) -> nn.Parameter:
        """B of the experts that came last, which learns where any B does."""
        return self._tensors("expert_B")[-1]

    def weights(self) -> Weights:
        """Return the tensors that the layer computes with, as they are now."""
        return Weights(
            self._whole("expert_A"),
            self._whole("expert_B"),
            {name: self._whole(name) for name in self.gate_names},
            {name: self._whole(name) for name in self.router_names},
            self.router_bias,
            self._shared_weights(),
        )

    def _shared_weights(self) -> Weights | None:
        if not self.shared_names:
            return None
        named = {name: getattr(self, name) for name in self.shared_names}
        gates = {n.removeprefix(SHARED): p for n, p in named.items() if n not in SHARED_PLAIN}
        router = {"router_weight": named["shared_gate"]} if "shared_gate" in named else {}
        return Weights(named["shared_A"], named["shared_B"], gates, router)

    def whole_name(self, name: str) -> str:
        """Return the parameter that a tensor belongs to: "expert_B" for "expert_B_1"."""
        return self.pieces[name].whole if name in self.pieces else name

    def output_factors(self) -> list[nn.Parameter]:
        """Return every B: the routed experts', growth by growth, and the shared expert's."""
        return [*self._tensors("expert_B"), *([self.shared_B] if self.shared_names else [])]

    def factor_pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each A and B with the other factor of its experts.

        The routed experts' stacks as they were added, and the shared expert's.
        """
        A, B = self._tensors("expert_A"), self._tensors("expert_B")
        if self.spec.share_A:
            pairs = [(A[0], joined("expert_B", B)), *((b, A[0]) for b in B)]
        else:
            pairs = [pair for a, b in zip(A, B, strict=True) for pair in ((a, b), (b, a))]
        if self.shared_names:
            pairs += [(self.shared_A, self.shared_B), (self.shared_B, self.shared_A)]
        return pairs

    def counts(self) -> list[LoadCount]:
        """Return where the choices of the tokens are counted; empty if nobody asks for them."""
        counts = [] if self.router_bias is None else [self.loads]
        return counts if self.choices is None else [*counts, self.choices]

    def by_expert(self) -> list[tuple[nn.Parameter, slice]]:
        """Return the parameters with a row for each expert, and which experts these are."""
        rows, generations = [], self.spec.generations
        for name, piece in self.pieces.items():
            first, count = sum(generations[: piece.growth]), generations[piece.growth]
            shared = piece.whole == "expert_A" and self.spec.share_A
            if piece.whole in ROW_BY_ROW and not shared:
                rows.append((getattr(self, name), slice(first, first + count)))
        return rows

    def _tensors(self, whole: str) -> list[nn.Parameter]:
        return [getattr(self, n) for n, piece in self.pieces.items() if piece.whole == whole]

    def _whole(self, name: str) -> Tensor:
        return joined(name, self._tensors(name))

    def _frozen(self, settings: Settings) -> frozenset[str]:
        """Return the tensors that are not trained: by `frozen`, and old ones by `freeze_old`.

        An A that is frozen as it was drawn stays so in added experts; experts that were imported
        and are frozen say nothing of those that are added.
        """
        frozen = set(FROZEN[settings.frozen])
        if settings.frozen == "A":
            frozen = {name for name in self.pieces if self.whole_name(name) == "expert_A"}
        last = len(self.spec.generations) - 1
        if last == 0:
            return frozenset(frozen)
        parts = {EXPERT: "experts", ROTATION_GATE: "experts", SCALING_GATE: "router"}
        for name, piece in self.pieces.items():
            if piece.growth < last and parts[self.role(name)] in settings.freeze_old:
                frozen.add(name)
        if "shared_expert" in settings.freeze_old:
            frozen |= set(self.shared_names)
        return frozenset(frozen)

    def residual(self) -> Weights | None:
        """Return where A and B started, with init_weights "svd"; None otherwise."""
        if "residual_A" not in self.frozen:
            return None
        return Weights(self.residual_A, self.residual_B)

    def role(self, name: str) -> str:
        """Return "expert", "scaling_gate" or "rotation_gate" for a parameter of this module."""
        whole = self.whole_name(name)
        if whole in self.gate_names or (name in self.shared_names and name not in SHARED_PLAIN):
            return ROTATION_GATE
        scales = whole in self.router_names or name == "shared_gate"
        return SCALING_GATE if scales else EXPERT

    def forward(self, way: Callable[..., Any], *arguments: Any) -> Any:
        """Return way(self, *arguments): parameters that are sharded are whole in here."""
        return way(self, *arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        """Move or cast; the bias never becomes a half type.

        It moves by steps of router_bias_rate, which a half type soon cannot add.
        """
        before_E = self.router_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's own types
        bias_E = self.router_bias
        if bias_E is not None and before_E is not None and bias_E.element_size() < 4:
            self.router_bias = at_least_float32(before_E.to(bias_E.device))
        return self

    def extra_repr(self) -> str:
        """Show shape and modes when the model is printed."""
        inputs, (_, rank, outputs) = self.expert_A.shape[-1], self.expert_B.shape
        experts = self.spec.num_experts
        return (
            f"in_features={inputs}, out_features={outputs}, num_experts={experts}, r={rank}, "
            f"top_k={self.spec.top_k}, rotation={self.spec.rotation!r}"
            + (f", shared_expert_r={self.shared_A.shape[1]}" if self.shared_names else "")
        )
