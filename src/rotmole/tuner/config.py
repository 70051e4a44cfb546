"""RotMoleConfig: every setting of the adapter, checked all at once."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from rotmole.errors import AdapterError, ConfigError
from rotmole.tuner.settings.balance_rules import (
    balance_notices,
    balance_problems,
    balance_rule_problems,
)
from rotmole.tuner.settings.config_rules import (
    FORMAT_VERSION,
    choice_problems,
    count_problems,
    fingerprint_problems,
    foreign_module,
    notices,
    number_problems,
    rule_problems,
    target_problems,
)
from rotmole.tuner.settings.expert_rules import expert_notices, expert_problems, is_routed
from rotmole.tuner.settings.presets import preset_fields
from rotmole.tuner.settings.router_rules import (
    router_notices,
    router_problems,
    router_rule_problems,
)
from rotmole.tuner.storage.weights import WEIGHTS, header_problems, read_header, refuse_pickle

REQUIRED = (
    "base_model_name_or_path", "r", "lora_alpha", "num_experts", "top_k", "selection",
    "norm_topk_prob", "rotation", "target_modules", "format_version",
)  # fmt: skip
"""Keys of a saved configuration without which a default would change the outputs silently."""

# A key in a saved configuration that this version does not know changes the mathematics if it
# speaks of one of these; PEFT's own future keys do not.
_OUR_WORDS = (
    "r", "alpha", "balance", "expert", "experts", "gate", "lora", "norm", "num", "radar", "rank",
    "rotation", "router", "scaling", "scoring", "selection", "share", "top",
)  # fmt: skip


@dataclass
class RotMoleConfig(PeftConfig):  # type: ignore[misc] # peft ships no types
    """Configuration of a mixture of low-rank experts gated by scaling and rotation.

        y = W x + s * sum_{e in S(x)} g_e(x) * R_e(x)[ A_e drop(x) ] B_e

    Names are PEFT's where PEFT's LoRA has the setting, and the field's where it has not.

    Args:
        r: R, rank of each expert.
        lora_alpha: s = lora_alpha / r (with `use_rslora`, lora_alpha / sqrt(r)).
        lora_dropout: probability of dropping an input of A and of vector gates.
        use_rslora: see lora_alpha.
        num_experts: E. With 1 there is no router, and rotation "none" is LoRA itself.
        top_k: K, experts a token uses; None is 2, or 1 if every module has one expert.
        router: how experts are scored, a name in rotmole.ops.ROUTERS: "linear", "mlp",
            "mlp_hadamard", "cosine", "attention", "hybrid", "hash" (of the token id), "magnitude".
        router_dim: hidden width of the routers that have one; None is 16.
        router_temperature: divides the router's scores; None is 1, for "cosine" 0.07.
        router_jitter: in training each input of a router is multiplied by a number drawn uniformly
            from 1 - router_jitter .. 1 + router_jitter.
        router_seed: of router "hash".
        router_bias_rate: how far a balancing bias moves in an optimiser step; the bias is added to
            the scores for the selection alone. 0: there is no bias.
        scoring: "softmax", or "sigmoid" (with selection top_k or dense).
        selection: "top_k"; "dense" (every expert); "top_p" (the fewest with probability top_p);
            "threshold" (those above a learned one); "expert_choice" (each expert takes its best
            tokens of a sequence, top_k of E on average; not for causal models).
        top_p: see selection.
        norm_topk_prob: whether the selected weights sum to one; false leaves them at their scores.
        rotation: the rotation gate, a name in rotmole.ops.ROTATIONS; see docs/method.md.
        rotation_input: what the vector gate of `bias` reads: "x" or "z".
        rotation_metric: "rank" keeps the length of z, "output" that of the expert's output.
        rotation_planes: planes of `givens`; None is r/2.
        radar_rank: hidden width of `radar` (None is 8) and of `radar_pairs` (None: constant).
        radar_normalize: divide radar's features by their root mean square.
        router_aux_loss_coef: weight of the load-balance loss (1 when balanced), averaged over the
            adapted layers; it acts through the gradient and is not part of the reported loss.
        router_aux_loss_scope: "sequence" (does not depend on how a batch is split) or
            "micro_batch" (does).
        router_z_loss_coef: weight of the router z-loss, treated likewise.
        router_task_loss_coef: weight of LoRAMoE's localised loss, treated likewise; batches must
            bring `task_id`, one whole number a row: the group of the row's task.
        router_task_offset: a of that loss: experts of a row's own group count 1 - a, others 1 + a.
        router_task_groups: into how many groups the experts are split, evenly and in order.
        router_sqrt_gate: A, B and rotation learn with sqrt(g) in place of g (arXiv 2502.15828).
        router_scope: "layer", or "block" (MixLoRA): a feed-forward block has one router, its
            experts adapt all its layers, and modules outside of such blocks have one expert.
        compute_dtype: type of the products with A, B and vector gates: "adapter", that of the
            weights (float32 on a half-precision base, unless autocast_adapter_dtype is false), as
            in PEFT's LoRA; or "input", that of the layer's input, with the weights kept as they
            are; on a bfloat16 base gradients stay within 2 % (tests/ops/mixture/test_fused.py),
            and whether it is faster depends on machine and shapes. Autocast goes before either.
            Gates, routing and angles are computed in at least float32 with both. The blocks of
            router_scope "block" compute as "adapter" says.
        dispatch: "fused" computes all experts in one product, "grouped" only the chosen ones;
            "auto" is grouped from 12 experts for each chosen one (docs/performance.md). The blocks
            of router_scope "block" are fused always.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, rank_pattern,
            alpha_pattern, modules_to_save, trainable_token_indices: as in PEFT's LoraConfig.
        num_experts_pattern, top_k_pattern: num_experts and top_k of modules that match a pattern,
            as rank_pattern; or a list, one value for each equal part of the model's depth (MoLA:
            [2, 4, 6, 8]). A module with one expert has no router.
        share_A: all experts share one A [1, R, D], and A x is computed once (HydraLoRA).
        frozen: "none", "A" or "AB": which factors stay as they start. "AB" trains the gates alone
            and is for imported adapters, see RotMoleModel.from_adapters.
        A_density: share of each row's entries of a frozen A that are not zero (FlyLoRA: K / E).
        goat_eta: a number replaces the scale by GOAT's closed form, s = sqrt(3 goat_eta D / r).
        init_weights: True starts at the base model's output (A Kaiming uniform, B = 0, rotations at
            the identity); "gaussian" likewise with a normal A; "svd" starts experts at segments of
            the base weight's SVD and subtracts what balanced gates would add (GOAT); False draws
            everything at random, for tests.
        format_version: version of the saved format; set by the library.
        base_fingerprint: what the base model looks like (rotmole.tuner.storage.fingerprint);
            set by the library when the adapter is put on a model, compared when a saved one is.

    Raises:
        ConfigError: (a ValueError) listing every setting that is wrong.
    """

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(default=16, metadata={"help": "The scale is lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    num_experts: int = field(default=4, metadata={"help": "Experts in each adapted layer."})
    top_k: int | None = field(default=None, metadata={"help": "Experts a token uses."})
    router: str = field(default="linear", metadata={"help": "How experts are scored."})
    router_dim: int | None = field(default=None, metadata={"help": "Hidden width of the router."})
    router_temperature: float | None = field(
        default=None, metadata={"help": "Divides the router's scores."}
    )
    router_jitter: float = field(default=0.0, metadata={"help": "Noise on a router's input."})
    router_seed: int = field(default=0, metadata={"help": "Seed of router hash."})
    router_bias_rate: float = field(default=0.0, metadata={"help": "Step of the balancing bias."})
    scoring: str = field(default="softmax", metadata={"help": "softmax or sigmoid."})
    selection: str = field(
        default="top_k", metadata={"help": "top_k, dense, top_p, threshold or expert_choice."}
    )
    top_p: float = field(default=0.5, metadata={"help": "Probability that top_p selects."})
    norm_topk_prob: bool = field(default=True, metadata={"help": "Selected weights sum to one."})
    rotation: str = field(default="tangent", metadata={"help": "The rotation gate."})
    rotation_input: str = field(default="x", metadata={"help": "x, or z for bias."})
    rotation_metric: str = field(default="rank", metadata={"help": "rank or output."})
    rotation_planes: int | None = field(default=None, metadata={"help": "Planes of givens."})
    radar_rank: int | None = field(default=None, metadata={"help": "Hidden width of radar."})
    radar_normalize: bool = field(default=True, metadata={"help": "Normalise radar's features."})
    router_aux_loss_coef: float = field(default=0.0, metadata={"help": "Load-balance weight."})
    router_aux_loss_scope: str = field(default="sequence", metadata={"help": "Over what it acts."})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Router z-loss weight."})
    router_task_loss_coef: float = field(default=0.0, metadata={"help": "Localised balance."})
    router_task_offset: float = field(default=0.1, metadata={"help": "How far tasks part."})
    router_task_groups: int = field(default=2, metadata={"help": "Groups of experts."})
    router_sqrt_gate: bool = field(default=False, metadata={"help": "Learn with sqrt(g)."})
    router_scope: str = field(default="layer", metadata={"help": "layer or block."})
    dispatch: str = field(default="auto", metadata={"help": "auto, fused or grouped."})
    compute_dtype: str = field(default="adapter", metadata={"help": "adapter or input."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer indices to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank of modules that match a pattern."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "lora_alpha of modules that match a pattern."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train."}
    )
    num_experts_pattern: dict[str, int] | list[int] = field(
        default_factory=dict, metadata={"help": "Experts by module pattern, or by depth."}
    )
    top_k_pattern: dict[str, int] | list[int] = field(
        default_factory=dict, metadata={"help": "top_k by module pattern, or by depth."}
    )
    share_A: bool = field(default=False, metadata={"help": "One A for all experts."})
    frozen: str = field(default="none", metadata={"help": "none, A or AB."})
    A_density: float = field(default=1.0, metadata={"help": "Share of non-zero entries of A."})
    goat_eta: float | None = field(default=None, metadata={"help": "GOAT's closed-form scale."})
    init_weights: bool | str = field(
        default=True, metadata={"help": "True, gaussian, svd; False: random, for tests."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Saved format."})
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "What the base model looks like."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ROTMOLE")
        self.is_saved = self.base_fingerprint is not None  # only a saved one comes with it
        foreign = foreign_module(self.auto_mapping)
        if foreign:
            warnings.warn(foreign, stacklevel=3)
            self.auto_mapping: dict[str, Any] | None = None
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # as PEFT's own configs keep it
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        if self.top_k is None and isinstance(self.num_experts, int):
            self.top_k = 2 if is_routed(self) else 1
        problems = [*count_problems(self), *number_problems(self), *choice_problems(self)]
        problems += [*target_problems(self), *expert_problems(self), *router_problems(self)]
        problems += [*balance_problems(self), *fingerprint_problems(self)]
        broken = {re.split(r"[ \[]", problem, maxsplit=1)[0] for problem in problems}
        problems += [*rule_problems(self, broken), *router_rule_problems(self, broken)]
        problems += balance_rule_problems(self, broken)
        if problems:
            raise ConfigError(problems, "RotMoleConfig")
        routed = is_routed(self)
        said = [*notices(self), *expert_notices(self), *router_notices(self, routed)]
        for notice in [*said, *balance_notices(self, routed)]:
            warnings.warn(notice, stacklevel=3)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> RotMoleConfig:
        """Make the configuration of a published method; docs/family.md says what each is.

            RotMoleConfig.preset("goat", r=4, task_type="CAUSAL_LM")

        Args:
            name: "lora" (arXiv 2106.09685), "moe_lora" (1701.06538), "hydralora" (2404.19245),
                "loramoe" (2312.09979), "mola" (2402.08562), "mixlora" (2404.15159), "adamole"
                (2405.00361), "goat" (2502.16894), "switch" (2101.03961), "top_p" (2403.07652),
                "radargate" (2505.23184), "rotmole" (2605.25565) or "flylora" (2510.08396).
            overrides: further settings, which win over the preset's.

        Raises:
            ConfigError: no such preset, or settings that do not fit.
        """
        return cls(**preset_fields(name, overrides))

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse keys of a saved configuration that would change the mathematics.

        Raises:
            AdapterError: naming each such key and the nearest known one; other unknown keys are
                left to PEFT, which warns about them.
        """
        if kwargs.get("peft_type", "ROTMOLE") != "ROTMOLE":
            return kwargs  # another method's file: PEFT makes that method's configuration of it
        absent = [key for key in REQUIRED if key not in kwargs]
        if absent and "peft_type" in kwargs:
            raise AdapterError(
                f"adapter_config.json: {', '.join(absent)} missing; without them the outputs could "
                "change unseen, so save the adapter again or restore the file"
            )
        known = {entry.name for entry in fields(cls)}
        problems = []
        for key in sorted(set(kwargs) - known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            if near or key.split("_")[0] in _OUR_WORDS:
                hint = f"did you mean {near[0]!r}? " if near else ""
                problems.append(f"unknown key {key!r} = {kwargs[key]!r}; {hint}")
        if problems:
            raise AdapterError(
                "adapter_config.json: " + "".join(problems) + "this version of rotmole cannot tell "
                "what it does to the outputs; update rotmole, or remove the key if it is a typo"
            )
        return kwargs

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> RotMoleConfig:
        """Read a saved configuration; what lies beside it in a local folder is looked at as well.

        Raises:
            AdapterError: a key that changes the outputs is missing or unknown, or the weights are
                a pickle, damaged, of no float format, or of another rank or number of experts.
            ConfigError: a value is wrong.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        local = (folder / CONFIG_NAME).is_file()
        if local:
            refuse_pickle(folder)
        config: RotMoleConfig = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        if local and (folder / WEIGHTS).is_file():
            problems = header_problems(config, read_header(folder / WEIGHTS))
            if problems:
                raise AdapterError(f"{folder / WEIGHTS}: {'; '.join(problems)}")
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read a saved configuration.

        Raises:
            AdapterError: the file is not a JSON object.
        """
        try:
            attributes: Any = super().from_json_file(path_json_file, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise AdapterError(f"{path_json_file} is not valid JSON: {error}") from error
        if not isinstance(attributes, dict):
            raise AdapterError(f"{path_json_file} must hold a JSON object of settings")
        return attributes
