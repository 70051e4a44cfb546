"""The record of an inspection: everything that the terminal, inspect.json and the report show.

Letters: E experts, N bins of a histogram, T tokens. Angles are in radians. A number that could not
be measured is None, and `Inspection.notes` says why.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rotmole.files import atomic_write_text

FILE = "inspect.json"
ALL = "all"
"""Name of the usage over the tokens of all tasks."""

Row = tuple[float, ...]
Table = tuple[Row, ...]
Known = tuple[float | None, ...]


@dataclass(frozen=True)
class Source:
    """What was inspected, on which tokens.

    Attributes:
        target: the run or adapter folder.
        model: name of the base model.
        settings: of the adapter that a reader wants to see, such as rotation or num_experts.
        rows: where the tokens come from, in words: "validation rows of runs/a", "a text".
        tokens: task -> tokens that statistics are over.
        versions: package -> version.
        seconds: that the inspection took.
        curves: task -> (update, validation loss) of the run; "" -> training loss. {} without a run.
    """

    target: str
    model: str
    settings: dict[str, str]
    rows: str
    tokens: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    curves: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """One sentence about the adapter, and the rule that made it.

    Attributes:
        name: of the rule, as in `rotmole.inspection.diagnose.RULES`.
        sentence: what is the case, with its number.
        rule: when it is said, in words.
        threshold: of the rule.
        value: the number that is compared with it; of the worst place if there are several.
        advice: what to do about it.
        is_fault: whether something should be changed; otherwise it is only worth knowing.
        layers: paths of the layers for which it holds, the worst one first.
        task: for which it holds; None: for all.
        experts: numbers of the experts in the first layer for which it holds.
    """

    name: str
    sentence: str
    rule: str
    threshold: float
    value: float
    advice: str
    is_fault: bool = True
    layers: tuple[str, ...] = ()
    task: str | None = None
    experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Angles:
    """How far the experts of a layer turned, over the tokens that selected each.

    Attributes:
        edges: [N + 1] of the histogram's bins, from -pi to pi.
        counts: [E, N] choices by angle.
        mean: [E] mean of |angle|; None for an expert that no token selected.
        resultant: [E] length of the mean of (cos, sin): 1 if all angles are equal.
        direction: [E] angle of that mean.
        turned: angle -> [E] share of choices that were turned by more.
        plane: [E] how alike the planes of the tokens are, over all tasks: 1 for one plane, 2 / rank
            for planes at random; None in the usage of one task, and if there are no planes.
    """

    edges: Row
    counts: Table
    mean: Known
    resultant: Known
    direction: Known
    turned: dict[str, Known]
    plane: Known | None = None


@dataclass(frozen=True)
class Usage:
    """How the experts of a layer were used by the tokens of one task, or of all.

    Attributes:
        tokens: number of tokens.
        choices: [E] tokens that selected each expert.
        share: [E] share of the choices; they add up to 1.
        part: [E] share of the weights; they add up to 1.
        weight: [E] mean weight of an expert given that it was selected.
        top: [E] share of tokens in which the expert has the largest weight.
        entropy: mean over tokens of the entropy of the router's probabilities, in nats.
        together: [E, E] share of tokens that selected both; the diagonal: that selected the one.
        angles: None without rotation.
    """

    tokens: int
    choices: tuple[int, ...]
    share: Row
    weight: Known
    top: Row
    entropy: float | None
    together: Table
    angles: Angles | None = None
    part: Row = ()


@dataclass(frozen=True)
class Affinity:
    """How much the task of a token, or its group such as a language, says about its expert.

    Attributes:
        information: mutual information of task and selected expert, in nats.
        chance: what it is expected to be if experts do not depend on the task.
        ceiling: what it is at most: the entropy of the tasks or of the choices, the smaller one.
        limit: what it exceeds by chance in 5 of 100 samples.
    """

    information: float
    chance: float
    ceiling: float
    limit: float = 0.0

    @property
    def share(self) -> float:
        """What is above chance, as a share of what is possible; 0 to 1."""
        room = self.ceiling - self.chance
        return max(self.information - self.chance, 0.0) / room if room > 0 else 0.0


@dataclass(frozen=True)
class Experts:
    """The experts of a layer themselves, by their products P_e = s A_e^T B_e [D, O].

    Attributes:
        norm: [E] |P_e| relative to the base layer's |W| (Frobenius).
        drift: [E] |P_e - P_e at the start|, relative to |W|; None if the start is unknown.
        cosine: [E, E] <P_i, P_j> / (|P_i| |P_j|); 0 if one of them is 0.
        alike: [E, E] 2 <P_i, P_j> / (|P_i|^2 + |P_j|^2), or that of the rotation gates if it is
            smaller: 1 for equal experts alone.
        input_angle: [E, E] mean principal angle between what two products read; None if one is 0.
        output_angle: [E, E] mean principal angle between what two products write.
        router_drift: estimate of how far the router's entries moved from their start, relative to
            the largest of them there; None without a router that starts uniformly.
        reach: outputs that two of its experts reach, for a drawing; None where not computed.
    """

    norm: Row
    drift: Known
    cosine: Table
    alike: Table
    input_angle: tuple[Known, ...]
    output_angle: tuple[Known, ...]
    router_drift: float | None = None
    reach: Reach | None = None


@dataclass(frozen=True)
class Reach:
    """Outputs of two experts of a layer for one token, in the plane that both span.

    The first coordinate is along the first expert's output, the second across it.

    Attributes:
        experts: numbers of both.
        outputs: both experts' outputs without rotation, 2 x (x, y).
        scaled: corners of what weights reach that are not negative and add up to at most 1.
        turned: points whose convex hull the same weights reach if each expert may be turned by any
            angle in the plane in which this token turned it; projected on the plane.
        actual: both experts' outputs as the adapter turned them, projected on the plane.
        token: the token's text.
    """

    experts: tuple[int, int]
    outputs: tuple[tuple[float, float], tuple[float, float]]
    scaled: tuple[tuple[float, float], ...]
    turned: tuple[tuple[float, float], ...]
    actual: tuple[tuple[float, float], tuple[float, float]]
    token: str = ""


@dataclass(frozen=True)
class StaticShare:
    """How much of what a layer's adapter adds the best static LoRA does as well.

    Attributes:
        ranks: 1, 2, 4 ...
        calibration: [ranks] share of the added power, over the tokens that it was fitted on.
        held_out: [ranks] the same over other rows.
        linear: (calibration, held out) share of the best linear map of any rank.
        tokens: (calibration, held out) numbers of tokens.
        power: (calibration, held out) mean over tokens of |y|^2, by which layers are weighed.
    """

    ranks: tuple[int, ...]
    calibration: Row
    held_out: Row
    linear: tuple[float, float]
    tokens: tuple[int, int]
    power: tuple[float, float]


@dataclass(frozen=True)
class Effects:
    """What routing and rotation change in a layer's output, over the tokens of one task or all.

    All are ratios of root mean squares over tokens.

    Attributes:
        added: |what the adapter adds| / |the layer's output|.
        rotation_off: |change if the rotation were off| / |what the adapter adds|; None without
            rotation.
        uniform: |change if each expert had the same weight| / |what the adapter adds|; None with
            one expert.
    """

    added: float
    rotation_off: float | None
    uniform: float | None


@dataclass(frozen=True)
class Answers:
    """Mean negative log-likelihood of an answer's tokens in nats, with parts of the adapter off.

    Attributes:
        trained: as trained.
        rotation_off: None without rotation.
        uniform: every token uses every expert with the same weight; None with one expert.
        base: without the adapter.
        tokens: number of scored tokens.
    """

    trained: float
    rotation_off: float | None
    uniform: float | None
    base: float
    tokens: int


@dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Attributes:
        path: in the base model.
        module: last part of the path, such as "q_proj".
        depth: number of the block in which it lies; None if the path has none.
        num_experts, rank, top_k: E, R and the experts that a token selects.
        rotation: its mode.
        usage: task -> usage; ALL over all tasks. {} if the layer was never called. A task whose
            rows have groups is several, such as "units/de" and "units/fr".
        affinity: "task" and "group" -> of experts and tasks, or groups over all tasks; neither if
            there is only one, or no router.
        experts: None for one expert.
        static: None if it was not asked for, or cannot be.
        effects: task -> effects; ALL over all tasks.
    """

    path: str
    module: str
    depth: int | None
    num_experts: int
    rank: int
    top_k: int
    rotation: str
    usage: dict[str, Usage] = field(default_factory=dict)
    affinity: dict[str, Affinity] = field(default_factory=dict)
    experts: Experts | None = None
    static: StaticShare | None = None
    effects: dict[str, Effects] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenRouting:
    """Where the tokens of a text went.

    Attributes:
        weight: [T, E]; 0 if not selected.
        angle: [T, E] of selected experts, 0 of the others; None without rotation.
    """

    weight: Table
    angle: Table | None = None


@dataclass(frozen=True)
class Passage:
    """A text, token by token.

    Attributes:
        tokens: [T] text of each token.
        mean: over all layers with the same number of experts as most have: the weight's mean, and
            the mean of |angle| over the layers that selected the expert.
        layers: path -> routing, of the layers that were asked for.
    """

    tokens: tuple[str, ...]
    mean: TokenRouting
    layers: dict[str, TokenRouting]


@dataclass(frozen=True)
class Inspection:
    """What is known of an adapter after inspecting it.

    Attributes:
        source: what was inspected.
        verdicts: faults first, the worst one first; empty: nothing is to be said.
        layers: in the order of the model.
        static: static share of the whole adapter, each layer weighed by its power; None if unknown.
        answers: task -> likelihood of the answers; ALL over all tasks. {} without rows.
        passage: of the text that was asked for.
        notes: what was not measured, and why.
    """

    source: Source
    verdicts: tuple[Verdict, ...]
    layers: tuple[Layer, ...]
    static: StaticShare | None = None
    answers: dict[str, Answers] = field(default_factory=dict)
    passage: Passage | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values."""
        content: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return content

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Inspection:
        """Return the record that `to_dict` made."""
        made: Inspection = _adapter().validate_python(content)
        return made

    def write(self, folder: Path) -> Path:
        """Write inspect.json into a folder, numbers with six digits, and return its path."""
        text = json.dumps(_short(self.to_dict()), ensure_ascii=False, separators=(",", ":"))
        return atomic_write_text(folder / FILE, text + "\n")

    @staticmethod
    def read(file: Path) -> Inspection:
        """Read an inspect.json."""
        made: Inspection = _adapter().validate_json(file.read_bytes())
        return made


def _short(value: Any) -> Any:
    """Return numbers with six digits, and whole ones without a point."""
    if isinstance(value, float):
        rounded = float(f"{value:.6g}")
        return int(rounded) if rounded.is_integer() else rounded
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    return [_short(each) for each in value] if isinstance(value, list | tuple) else value


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Inspection)
