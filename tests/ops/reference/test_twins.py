"""Each public function of the fast side has a slow twin, and a test compares the two."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import rotmole.ops

ROOT = Path(__file__).parents[3]
OPS = ROOT / "src" / "rotmole" / "ops"
FAST_ROOMS = ("routing", "rotation", "mixture")

# "room.module:function" of the fast side -> "module:function" in ops/reference
TWINS = {
    "routing.routers:router_shapes": "shapes:router_shapes",
    "routing.routers:router_scores": "routing:router_scores",
    "routing.threshold:threshold_shapes": "shapes:threshold_shapes",
    "routing.threshold:threshold_of": "routing:threshold_of",
    "routing.selection:top_k_of": "routing:top_k_of",
    "routing.selection:select": "routing:select",
    "routing.selection:choose": "routing:choose",
    "routing.selection:spread_chosen": "routing:spread_chosen",
    "routing.route:scaling_gate_shapes": "shapes:scaling_gate_shapes",
    "routing.route:route": "routing:route",
    "routing.route:select_by": "routing:select",
    "routing.generations:select_generations": "generations:select_generations",
    "routing.balance:load_balance_loss": "balance:load_balance_loss",
    "routing.balance:router_z_loss": "balance:router_z_loss",
    "routing.balance:balance_gradient": "balance:balance_gradient",
    "routing.balance:usage": "balance:usage",
    "routing.task_balance:expert_groups": "balance:expert_groups",
    "routing.task_balance:task_balance_loss": "balance:task_balance_loss",
    "rotation.modes:inner": "rotation:inner",
    "rotation.modes:square": "rotation:square",
    "rotation.modes:floor_at": "method:floor_at",
    "rotation.modes:part_across": "method:across",
    "rotation.modes:angle_between": "turns:angle_between",
    "rotation.modes:output_metric": "method:metric_matrix",
    "rotation.modes:tangent": "method:tangent",
    "rotation.modes:bivector": "method:bivector",
    "rotation.modes:plane": "method:plane",
    "rotation.modes:givens": "method:givens",
    "rotation.modes:cayley": "method:cayley",
    "rotation.modes:bias": "method:bias",
    "rotation.modes:scale": "method:scale",
    "rotation.modes:core": "method:core",
    "rotation.table:gate_shapes": "shapes:gate_shapes",
    "rotation.table:is_rotation": "rotation:is_rotation",
    "rotation.adjoint:adjoint": "rotation:adjoint",
    "mixture.products:tokens_last": "products:project",
    "mixture.products:project": "products:project",
    "mixture.products:project_all": "products:project_all",
    "mixture.products:combine_all": "products:combine_all",
    "mixture.dense:shared_weight": "method:shared_weight",
    "mixture.products:stack": "products:stack",
    "mixture.products:activations": "products:activations",
    "mixture.products:read_gate": "products:read_gate",
    "mixture.products:combine": "products:combine",
    "mixture.products:add_product": "products:add_product",
    "mixture.products:scaled_product": "products:add_product",
    "mixture.dense:rotated": "method:rotated",
    "mixture.dense:mixture": "method:mixture",
    "mixture.radar:radar_sum": "method:radar",
    "mixture.radar:radar_pairs_weights": "method:radar_pairs",
    "mixture.radar:radar_outputs": "method:radar",
    "mixture.radar:radar_pairs_angles": "turns:turns",
    "mixture.dense:turns": "turns:turns",
    "mixture.sqrt_gate:combine_sqrt_gate": "products:combine_sqrt_gate",
    "mixture.passes:dropped": "products:dropped",
    "mixture.passes:forward": "layer:layer",
    "mixture.passes:backward": "layer:layer_gradients",
    "mixture.rank_space:read_small_gates": "products:read_gate",
    "mixture.rank_space:weigh": "layer:weighted_activations",
    "mixture.rank_space:turn_back": "layer:layer_gradients",
    "mixture.fused:can_fuse": "rotation:can_fuse",
    "mixture.fused:can_compile": "rotation:can_compile",
    "mixture.fused:fused_mixture": "layer:layer",
    "mixture.grouped:chosen_dots": "products:chosen_dots",
    "mixture.grouped:chosen_sum": "products:chosen_sum",
    "mixture.grouped:chosen_outer": "products:chosen_outer",
    "mixture.grouped:grouped_mixture": "method:mixture",
    "mixture.packed:pack": "layer:pack",
    "mixture.packed:packed_activations": "layer:weighted_activations",
    "mixture.packed:packed_additions": "layer:layer",
    "mixture.packed:packed_mixture": "layer:layer",
    "mixture.block:slot_experts": "block:slot_experts",
    "mixture.block:slot_additions": "block:slot_additions",
    "mixture.block:slot_mean": "block:slot_mean",
    "mixture.block:weigh_slots": "block:weigh_slots",
}


def public_functions() -> list[str]:
    names = []
    for room in FAST_ROOMS:
        for path in sorted((OPS / room).glob("*.py")):
            module = importlib.import_module(f"rotmole.ops.{room}.{path.stem}")
            names += [
                f"{room}.{path.stem}:{name}"
                for name, function in inspect.getmembers(module, inspect.isfunction)
                if function.__module__ == module.__name__ and not name.startswith("_")
            ]
    return names


def test_each_public_function_has_a_twin() -> None:
    functions = set(public_functions())
    assert not functions - set(TWINS), "these have no slow twin in TWINS"
    assert not set(TWINS) - functions, "TWINS names these, which are gone or private"


@pytest.mark.parametrize("twin", sorted(set(TWINS.values())))
def test_each_twin_exists(twin: str) -> None:
    module, _, name = twin.partition(":")
    path = f"rotmole.ops.reference.{module}"
    function = getattr(importlib.import_module(path), name)
    assert inspect.isfunction(function)
    assert function.__module__ == path, "a twin is a function of its own, not an imported one"


def names_used(path: Path) -> set[str]:
    """Return the full names of the functions of ops that a test file names.

    Both `slow` after `from rotmole.ops.reference.block import block as slow` and `block.block`
    after `from rotmole.ops.reference import block` name it. An import alone does not count.
    """
    imported: dict[str, str] = {}
    used = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rotmole.ops"):
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in imported:
            used.add(imported[node.id])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add(f"{imported.get(node.value.id)}.{node.attr}")
    return used


def test_a_test_compares_each_function_with_its_twin() -> None:
    """One file at least names both, under tests/ops or tests/tuner."""
    folders = (ROOT / "tests" / "ops", ROOT / "tests" / "tuner")
    files = [names_used(path) for folder in folders for path in folder.rglob("*.py")]
    faces = {name: getattr(rotmole.ops, name) for name in rotmole.ops.__all__}
    uncompared = []
    for fast, twin in TWINS.items():
        names = {"rotmole.ops." + fast.replace(":", ".")}
        name = fast.partition(":")[2]
        if name in faces:
            names.add(f"rotmole.ops.{name}")
        slow = "rotmole.ops.reference." + twin.replace(":", ".")
        if not any(slow in used and names & used for used in files):
            uncompared.append(f"{fast} with {twin}")
    assert not uncompared


def imports_of(path: Path) -> set[str]:
    """Return every module that a file of ops imports, the packages of relative imports included."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_neither_side_imports_the_other() -> None:
    """The reference imports torch, the standard library and itself alone."""
    reference, slow = "rotmole.ops.reference", OPS / "reference"
    for path in slow.rglob("*.py"):
        ours = {name for name in imports_of(path) if name.startswith("rotmole")}
        assert all(name.startswith(reference + ".") for name in ours), f"{path}: {ours}"
    for path in set(OPS.rglob("*.py")) - set(slow.rglob("*.py")):
        assert not [name for name in imports_of(path) if name.startswith(reference)], path
