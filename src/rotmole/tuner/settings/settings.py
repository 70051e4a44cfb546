"""Settings: every setting of the method, its meaning and its range in one place."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from rotmole.ops.rotation.table import ROTATIONS
from rotmole.ops.routing.routers import ROUTERS
from rotmole.ops.routing.selection import SCORINGS, SELECTIONS
from rotmole.tuner.settings.ranges import (
    Range,
    above,
    at_least,
    by_module,
    choice,
    entries_of,
    flag,
    is_whole,
    modules,
    names,
    or_null,
    share,
    whole,
)


def _about(allowed: Range | None, text: str, *, example: Any) -> dict[str, Any]:
    """Describe a field: its range (None: PEFT checks it), its meaning, and a possible value."""
    return {"help": text, "range": allowed, "example": example}


_START = Range(
    "true, false, gaussian or svd", lambda value: value in (True, False, "gaussian", "svd")
)
PARTS = ("experts", "router", "shared_expert")
"""What can be kept from being trained when a mixture has grown."""
_COUNTS = Range(
    "a list of whole numbers of at least 1",
    lambda value: isinstance(value, (list, tuple)) and all(is_whole(n) and n >= 1 for n in value),
)
_PARTS = Range(
    f"a list of any of {', '.join(PARTS)}",
    lambda value: isinstance(value, (list, tuple)) and all(part in PARTS for part in value),
)


@dataclass
class Settings:
    """Settings of a mixture of low-rank experts, without PEFT and without a model.

        y = W x + s * sum_{e in S(x)} g_e(x) * R_e(x)[ A_e drop(x) ] B_e
              + s_0 * g_0(x) * R_0(x)[ A_0 drop(x) ] B_0             with a shared expert

    RotMoleConfig adds what PEFT needs. The metadata of each field holds its meaning ("help"), its
    range ("range") and an example; docs/reference.md is generated from them.
    """

    r: int = field(default=8, metadata=_about(whole(1), "R, the rank of each expert.", example=16))
    lora_alpha: float = field(
        default=16,
        metadata=_about(
            above(0),
            "The scale is s = lora_alpha / r; with use_rslora, lora_alpha / sqrt(r).",
            example=32,
        ),
    )
    lora_dropout: float = field(
        default=0.0,
        metadata=_about(
            share(zero=True),
            "Probability of dropping an input of A and of vector gates in training.",
            example=0.05,
        ),
    )
    use_rslora: bool = field(
        default=False, metadata=_about(flag(), "Scale by lora_alpha / sqrt(r).", example=True)
    )
    num_experts: int = field(
        default=4,
        metadata=_about(
            whole(1),
            "E, the number of experts in each adapted layer. With 1 there is no router, and "
            "rotation none is LoRA itself.",
            example=8,
        ),
    )
    top_k: int | None = field(
        default=None,
        metadata=_about(
            or_null(whole(1)),
            "K, the number of experts that a token uses; null means 2, or 1 if every module has "
            "one expert.",
            example=1,
        ),
    )
    router: str = field(
        default="linear",
        metadata=_about(
            choice(ROUTERS),
            "How experts are scored. hash reads the token's id, magnitude the length of A x; "
            "the others are learned. docs/method.md has the formulas.",
            example="cosine",
        ),
    )
    router_dim: int | None = field(
        default=None,
        metadata=_about(
            or_null(whole(1)),
            "Hidden width of the routers mlp, mlp_hadamard, cosine, attention and hybrid; null "
            "means 16. It factors router linear into two matrices, null leaves it whole.",
            example=32,
        ),
    )
    router_temperature: float | None = field(
        default=None,
        metadata=_about(
            or_null(above(0)),
            "Divides the router's scores; null means 1, for cosine 0.07.",
            example=0.5,
        ),
    )
    router_jitter: float = field(
        default=0.0,
        metadata=_about(
            share(zero=True),
            "In training, each input of a router is multiplied by a random number, uniform "
            "between 1 - router_jitter and 1 + router_jitter.",
            example=0.01,
        ),
    )
    router_seed: int = field(
        default=0, metadata=_about(whole(0), "Seed of the router hash.", example=1)
    )
    router_bias_rate: float = field(
        default=0.0,
        metadata=_about(
            at_least(0),
            "How far the balancing bias of each expert moves in an optimizer step. The bias is "
            "added to the scores for the selection only. With 0 there is no bias.",
            example=0.001,
        ),
    )
    scoring: str = field(
        default="softmax",
        metadata=_about(
            choice(SCORINGS),
            "How scores become weights; sigmoid needs selection top_k or dense.",
            example="sigmoid",
        ),
    )
    selection: str = field(
        default="top_k",
        metadata=_about(
            choice(SELECTIONS),
            "Which experts a token uses: the K with the highest scores (top_k), every expert "
            "(dense), the fewest experts whose probability reaches top_p (top_p), those above a "
            "learned threshold (threshold), or each expert takes its best tokens of a "
            "sequence, top_k experts a token on average (expert_choice; not for causal models).",
            example="top_p",
        ),
    )
    top_p: float = field(
        default=0.5,
        metadata=_about(
            share(one=True), "The probability that selection top_p must reach.", example=0.4
        ),
    )
    norm_topk_prob: bool = field(
        default=True,
        metadata=_about(
            flag(),
            "Whether the weights of the selected experts are divided by their sum; false leaves "
            "them as they are.",
            example=False,
        ),
    )
    routed_scaling_factor: float = field(
        default=1.0,
        metadata=_about(
            above(0),
            "Multiplies the sum of the selected experts, as in DeepSeek-V3: it is part of s in "
            "modules with more than one expert. The shared expert is not multiplied. top_k "
            "undoes that weights which sum to one shorten the experts' steps (docs/method.md).",
            example=2.0,
        ),
    )
    rotation: str = field(
        default="tangent",
        metadata=_about(
            choice(ROTATIONS),
            "The rotation gate; docs/method.md has the formulas.",
            example="givens",
        ),
    )
    rotation_input: str = field(
        default="x",
        metadata=_about(
            choice(("x", "z", "router")),
            "What the gates of a rotation read: the layer's input x, the expert's activation z = "
            "A x (tangent, bivector, plane, givens and bias), or the router's logits. z and "
            "router make them nearly free.",
            example="z",
        ),
    )
    rotation_dim: int | None = field(
        default=None,
        metadata=_about(
            or_null(whole(1)),
            "H: all gates of a layer's rotation read C x, H numbers that one map makes of x; null "
            "means that they read x itself.",
            example=4,
        ),
    )
    rotation_metric: str = field(
        default="rank",
        metadata=_about(
            choice(("rank", "output")),
            "Which length the rotation keeps: that of z (rank), or that of the expert's output "
            "(output).",
            example="output",
        ),
    )
    rotation_planes: int | None = field(
        default=None,
        metadata=_about(
            or_null(whole(1)),
            "Number of planes that rotation givens turns; null means r / 2.",
            example=2,
        ),
    )
    radar_rank: int | None = field(
        default=None,
        metadata=_about(
            or_null(whole(1)),
            "Hidden width of rotation radar (null means 8) and of radar_pairs (null means "
            "angles that do not depend on the input).",
            example=4,
        ),
    )
    radar_normalize: bool = field(
        default=True,
        metadata=_about(
            flag(), "Whether radar's features are divided by their root mean square.", example=False
        ),
    )
    router_aux_loss_coef: float = field(
        default=0.0,
        metadata=_about(
            at_least(0),
            "Weight of the load-balance loss (1 when balanced), averaged over the adapted "
            "layers. It acts through the gradient and is not part of the reported loss.",
            example=0.01,
        ),
    )
    router_aux_loss_scope: str = field(
        default="sequence",
        metadata=_about(
            choice(("sequence", "micro_batch")),
            "Over which tokens the load-balance loss averages: a sequence (the loss does not "
            "depend on how a batch is split), or a micro-batch (it does).",
            example="micro_batch",
        ),
    )
    router_z_loss_coef: float = field(
        default=0.0,
        metadata=_about(
            at_least(0),
            "Weight of the router z-loss, averaged over the adapted layers; it is not part of "
            "the reported loss.",
            example=0.001,
        ),
    )
    router_task_loss_coef: float = field(
        default=0.0,
        metadata=_about(
            at_least(0),
            "Weight of LoRAMoE's localised loss, averaged over the adapted layers. Each batch "
            "must bring `task_id`: for each row one whole number, the group of the row's task.",
            example=0.1,
        ),
    )
    router_task_offset: float = field(
        default=0.1,
        metadata=_about(
            share(zero=True),
            "a of the localised loss: experts of a row's own group count 1 - a, other experts 1 "
            "+ a.",
            example=0.2,
        ),
    )
    router_task_groups: int = field(
        default=2,
        metadata=_about(
            whole(1),
            "Number of groups into which the localised loss splits the experts, evenly and in "
            "order.",
            example=3,
        ),
    )
    router_sqrt_gate: bool = field(
        default=False,
        metadata=_about(
            flag(),
            "Whether A, B and the rotation get the gradient of a mixture weighted by sqrt(g) in "
            "place of g (arXiv 2502.15828).",
            example=True,
        ),
    )
    router_scope: str = field(
        default="layer",
        metadata=_about(
            choice(("layer", "block")),
            "layer: each adapted layer has its own router. block (MixLoRA): each feed-forward "
            "block has one router, its experts adapt all layers of the block, and modules "
            "outside of such blocks have one expert.",
            example="block",
        ),
    )
    dispatch: str = field(
        default="auto",
        metadata=_about(
            choice(("auto", "fused", "grouped")),
            "How experts are computed: all in one product (fused), only the selected ones "
            "(grouped), or grouped from 12 experts for each selected one (auto; "
            "docs/performance.md). The blocks of router_scope block are always fused.",
            example="grouped",
        ),
    )
    compute_dtype: str = field(
        default="adapter",
        metadata=_about(
            choice(("adapter", "input")),
            "Number format of the products with A, B and vector gates: that of the adapter's "
            "weights, as in PEFT's LoRA (adapter), or that of the layer's input (input). "
            "Autocast overrides both. Gates, routing and angles are computed in at least "
            "float32. The blocks of router_scope block compute as with adapter. "
            "docs/performance.md compares the two.",
            example="input",
        ),
    )
    kernels: str = field(
        default="eager",
        metadata=_about(
            choice(("eager", "compiled")),
            "How the steps between the matrix products (routing, rotating, weighing, and back) are "
            "computed: operation by operation (eager), or by kernels that torch's compilers make "
            "of them once (compiled), which needs a C++ compiler, or Triton on a GPU, and takes "
            "some seconds at the start. The results are the same to rounding. For rotation none, "
            "tangent, plane and givens; without a compiler it is eager, with a warning. "
            "docs/performance.md says when it pays.",
            example="compiled",
        ),
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata=_about(
            modules(),
            "Modules to adapt: a list of names, a regular expression, or 'all-linear'; null "
            "means PEFT's choice for the model's architecture.",
            example=["q_proj", "v_proj"],
        ),
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata=_about(
            modules(),
            "Modules to leave out: a list of names or a regular expression.",
            example=["lm_head"],
        ),
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata=_about(None, "Indices of the layers to adapt; null means all.", example=[0, 1]),
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata=_about(
            None, "Name of the model's list of layers, for layers_to_transform.", example="layers"
        ),
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata=_about(
            by_module(whole(1)),
            "r of the modules whose names match a pattern.",
            example={"q_proj": 16},
        ),
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata=_about(
            by_module(above(0)),
            "lora_alpha of the modules whose names match a pattern.",
            example={"q_proj": 32},
        ),
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata=_about(
            None, "Further modules that are trained and saved as a whole.", example=["embed_tokens"]
        ),
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata=_about(None, "Token ids whose embeddings are trained.", example=[0, 1]),
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata=_about(
            flag(),
            "Whether modules_to_save and trainable_token_indices keep embeddings tied that the "
            "base model ties, as in PEFT's LoRA; false trains and saves each by itself.",
            example=True,
        ),
    )
    num_experts_pattern: dict[str, int] | list[int] = field(
        default_factory=dict,
        metadata=_about(
            by_module(whole(1), or_by_depth=True),
            "num_experts of the modules whose names match a pattern, or by depth: MoLA is [2, "
            "4, 6, 8]. A module with one expert has no router.",
            example=[2, 4, 6, 8],
        ),
    )
    top_k_pattern: dict[str, int] | list[int] = field(
        default_factory=dict,
        metadata=_about(
            by_module(whole(1), or_by_depth=True),
            "top_k of the modules whose names match a pattern, or by depth.",
            example={"down_proj": 1},
        ),
    )
    shared_expert_r: int = field(
        default=0,
        metadata=_about(
            whole(0),
            "R_0, the rank of the shared expert, which every token uses beside those that the "
            "router selects (DeepSeekMoE); 0 means that there is none.",
            example=8,
        ),
    )
    shared_expert_alpha: float | None = field(
        default=None,
        metadata=_about(
            or_null(above(0)),
            "The scale of the shared expert is s_0 = shared_expert_alpha / shared_expert_r; with "
            "use_rslora, shared_expert_alpha / sqrt(shared_expert_r). null means the scale s of "
            "the other experts.",
            example=16,
        ),
    )
    shared_expert_rotation: str = field(
        default="none",
        metadata=_about(
            choice(ROTATIONS), "The rotation gate of the shared expert.", example="tangent"
        ),
    )
    shared_expert_gate: bool = field(
        default=False,
        metadata=_about(
            flag(),
            "Whether the shared expert is weighed by the sigmoid of a linear map of x (Qwen2-MoE); "
            "otherwise its weight is 1.",
            example=True,
        ),
    )
    expert_names: list[str] | None = field(
        default=None,
        metadata=_about(
            names(),
            "A name for each expert, as `rotmole combine` gives them; reports use them. null: "
            "experts have numbers only.",
            example=["math", "code"],
        ),
    )
    experts_added: list[int] = field(
        default_factory=list,
        metadata=_about(
            _COUNTS,
            "Numbers of experts that `rotmole grow` added, growth by growth; they are the last of "
            "num_experts. Experts that came together are chosen among themselves, so what the "
            "others compute does not change (docs/grow.md).",
            example=[2],
        ),
    )
    freeze_old: list[str] = field(
        default_factory=list,
        metadata=_about(
            _PARTS,
            "What a grown mixture keeps of what it had before its last growth: experts (A, B and "
            "rotation gates), router, shared_expert.",
            example=["experts", "router"],
        ),
    )
    share_A: bool = field(
        default=False,
        metadata=_about(
            flag(),
            "Whether all experts share one A, of shape [1, R, D]; A x is computed once "
            "(HydraLoRA).",
            example=True,
        ),
    )
    frozen: str = field(
        default="none",
        metadata=_about(
            choice(("none", "A", "AB")),
            "Which factors keep their initial values. AB trains the gates only and is for "
            "experts that were trained before (experts_from, RotMoleModel.from_adapters).",
            example="A",
        ),
    )
    A_density: float = field(
        default=1.0,
        metadata=_about(
            share(one=True),
            "Share of the entries in each row of a frozen A that are not zero (FlyLoRA: K / E).",
            example=0.25,
        ),
    )
    goat_eta: float | None = field(
        default=None,
        metadata=_about(
            or_null(above(0)),
            "A number replaces the scale by GOAT's closed form, s = sqrt(3 goat_eta D / r).",
            example=1.0,
        ),
    )
    init_weights: bool | str = field(
        default=True,
        metadata=_about(
            _START,
            "Initial weights. true: the model starts at the base model's output (A Kaiming "
            "uniform, B zero, rotations at the identity). gaussian: the same with a normal A. "
            "svd (GOAT): experts start at segments of the base weight's SVD, and what balanced "
            "gates would add is subtracted. false: everything is random, for tests.",
            example="gaussian",
        ),
    )

    @property
    def is_routed(self) -> bool:
        """Whether any module may have more than one expert, hence a router."""
        counts = [self.num_experts, *(n for _, n in entries_of(self.num_experts_pattern))]
        return any(is_whole(count) and count > 1 for count in counts)

    def plain(self) -> Settings:
        """Return these settings as a plain Settings, without what PEFT adds.

        `dataclasses.replace` on the result checks nothing and warns of nothing.
        """
        return Settings(**{entry.name: getattr(self, entry.name) for entry in fields(Settings)})


def range_problems(settings: Settings) -> dict[str, list[str]]:
    """Check each setting by itself.

    Returns:
        Name of a setting -> one sentence for each problem; settings that are right are left out.
    """
    problems = {}
    for entry in fields(Settings):
        allowed: Range | None = entry.metadata["range"]
        if allowed is not None:
            sentences = list(allowed.problems(entry.name, getattr(settings, entry.name)))
            if sentences:
                problems[entry.name] = sentences
    return problems
