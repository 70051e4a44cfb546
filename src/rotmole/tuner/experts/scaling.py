"""The scaling gate of one layer: its settings, its parameters, and what it says of some tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from rotmole.errors import ModelError
from rotmole.ops.routing.plain import Routing
from rotmole.ops.routing.routers import ROUTERS, router_scores, router_shapes
from rotmole.ops.routing.selection import SELECTIONS, select, threshold_of, threshold_shapes

if TYPE_CHECKING:
    from rotmole.tuner.batch.losses import BalanceState
    from rotmole.tuner.config import RotMoleConfig


class Tokens(NamedTuple):
    """What is known of the T tokens of a layer's input beside the input itself.

    Attributes:
        ids_T: [T] token ids.
        mask_T: [T] True where a token is no padding; None: all.
        sequences: N; the tokens are N sequences of T/N positions.
    """

    ids_T: Tensor | None = None
    mask_T: Tensor | None = None
    sequences: int = 1


NO_TOKENS = Tokens()


def reads_ids(config: RotMoleConfig) -> bool:
    """Tell whether the router needs token ids."""
    return config.router in ROUTERS and ROUTERS[config.router].reads == "ids"


def reads_sequences(config: RotMoleConfig) -> bool:
    """Tell whether the selection looks at the other tokens of a sequence."""
    return config.selection in SELECTIONS and SELECTIONS[config.selection].sequences


def check_stack(model: Any, name: str, config: RotMoleConfig) -> None:
    """Refuse modules where a router or selection that looks beside its input cannot work.

    Args:
        model: the base model.
        name: path of the module in it.
        config: of the adapter in that module.

    Raises:
        ModelError: expert choice in a model that writes token by token, or either beside the
            encoder of an encoder-decoder.
    """
    if config.num_experts == 1 or not (reads_ids(config) or reads_sequences(config)):
        return
    setting = f"router {config.router!r}" if reads_ids(config) else "selection 'expert_choice'"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
        path = next((path for path, part in model.named_modules() if part is encoder), None)
        if path is None or not name.startswith(path + "."):
            raise ModelError(
                f"{setting} works in the encoder of an encoder-decoder model, and {name!r} lies "
                "outside it, where cross-attention reads other tokens than its neighbours; "
                "restrict target_modules to the encoder"
            )
    elif reads_sequences(config) and hasattr(model, "can_generate") and model.can_generate():
        raise ModelError(
            f"{setting} cannot be used in {type(model).__name__}, which writes token by token: "
            "experts would choose among tokens that are not written yet, so training and "
            "generation would differ; use selection top_k"
        )


def ids_of(state: BalanceState, x: Tensor) -> Tokens:
    """Return the ids of the tokens of x [N, S, D], as the hook on the model kept them.

    Raises:
        ModelError: the model got no input_ids, or x is not [N, S, D] for ids [N, S].
    """
    if state.ids is None:
        raise ModelError(
            "router 'hash' chooses experts by token id, and the model was called without input_ids "
            "(with inputs_embeds, or one of its parts by itself); pass input_ids to the whole "
            "model, or choose another router"
        )
    if state.ids.shape != x.shape[:-1]:
        raise ModelError(
            f"router 'hash' got token ids of shape {tuple(state.ids.shape)} and a layer input of "
            f"shape {tuple(x.shape)}: that layer does not see one row for each token; leave it out "
            "of target_modules, or choose another router"
        )
    return Tokens(ids_T=state.ids.reshape(-1).to(x.device))


def sequences_of(state: BalanceState, x: Tensor) -> Tokens:
    """Return where the sequences of x begin and which of its tokens are padding.

    An input [N, S, D] holds N sequences, an input [N, D] (a pooler's) N sequences of one token.

    Raises:
        ModelError: x does not have the attention mask's shape, so that padding is unknown.
    """
    if x.dim() < 3:
        known = next((t for t in (state.mask, state.ids) if t is not None), None)
        if x.dim() == 2 and known is not None and known.shape[0] == x.shape[0]:
            return Tokens(sequences=x.shape[0])
        if x.dim() == 1:
            return Tokens()
    elif state.mask is None:
        return Tokens(sequences=x.shape[0])
    elif state.mask.shape == x.shape[:-1]:
        return Tokens(mask_T=state.mask.reshape(-1).to(x.device), sequences=x.shape[0])
    raise ModelError(
        f"selection 'expert_choice' got a layer input of shape {tuple(x.shape)} and cannot tell "
        "its sequences and padding (inputs must be [sequences, positions, features], as the "
        "attention mask says); leave that layer out of target_modules, or choose another selection"
    )


@dataclass(frozen=True)
class ScalingGate:
    """Settings of a scaling gate; see RotMoleConfig for their meaning."""

    experts: int
    router: str
    selection: str
    scoring: str
    top_k: int
    norm_topk_prob: bool
    top_p: float
    dim: int | None
    temperature: float | None
    jitter: float
    seed: int

    @classmethod
    def of(cls, config: RotMoleConfig) -> ScalingGate:
        """Take the settings out of a configuration."""
        assert config.top_k is not None
        return cls(
            experts=config.num_experts,
            router=config.router,
            selection=config.selection,
            scoring=config.scoring,
            top_k=config.top_k,
            norm_topk_prob=config.norm_topk_prob,
            top_p=config.top_p,
            dim=config.router_dim,
            temperature=config.router_temperature,
            jitter=config.router_jitter,
            seed=config.router_seed,
        )

    @property
    def is_plain(self) -> bool:
        """Whether it is softmax over a linear router, top_k or dense, as it stands."""
        usual = (self.router, self.scoring, self.jitter) == ("linear", "softmax", 0.0)
        return usual and self.temperature is None and self.selection in ("top_k", "dense")

    def shapes(self, in_features: int) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every parameter."""
        shapes = router_shapes(self.router, E=self.experts, D=in_features, H=self.dim)
        if self.selection == "threshold":
            shapes |= threshold_shapes(in_features)
        return shapes

    def tokens(self, state: BalanceState, x: Tensor) -> Tokens:
        """Return what this gate wants to know of the tokens of x."""
        if self.experts == 1:
            return NO_TOKENS
        if ROUTERS[self.router].reads == "ids":
            return ids_of(state, x)
        return sequences_of(state, x) if SELECTIONS[self.selection].sequences else NO_TOKENS

    def route(
        self,
        x_TD: Tensor,
        parameters: Mapping[str, Tensor],
        *,
        A_ERD: Tensor,
        tokens: Tokens = NO_TOKENS,
        bias_E: Tensor | None = None,
        training: bool = False,
    ) -> tuple[Tensor, Routing]:
        """Score, select and weigh.

        Args:
            x_TD: [T, D] layer input.
            parameters: those of `shapes`.
            A_ERD: the experts' input factors, for router "magnitude".
            tokens: what `tokens` returned.
            bias_E: [E] added to the scores for the selection alone.
            training: whether the router's input is jittered.

        Returns:
            (logits [T, E], the routing).
        """
        logits_TE = router_scores(
            self.router,
            x_TD,
            {name: parameters[name] for name in parameters if "threshold" not in name},
            experts=self.experts,
            A_ERD=A_ERD,
            ids_T=tokens.ids_T,
            temperature=self.temperature,
            jitter=self.jitter if training else 0.0,
            seed=self.seed,
        )
        tau_T1 = None
        if self.selection == "threshold":
            weight, bias = (parameters[f"router_threshold_{part}"] for part in ("weight", "bias"))
            tau_T1 = threshold_of(x_TD, weight, bias, experts=self.experts)
        routing = select(
            logits_TE,
            selection=self.selection,
            scoring=self.scoring,
            top_k=self.top_k,
            norm_topk_prob=self.norm_topk_prob,
            top_p=self.top_p,
            tau_T1=tau_T1,
            bias_E=bias_E,
            weight=ROUTERS[self.router].weight,
            sequences=tokens.sequences,
            mask_T=tokens.mask_T,
        )
        return logits_TE, routing
