"""The house keeps its order: a room imports only rooms to its left."""

from __future__ import annotations

import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "univla_jax"
# Rooms from left to right; those of one rank may import each other.
RANKS = {
    "errors": 0,
    "client": 0,
    "episode": 0,
    "config": 0,
    "buckets": 0,
    "io": 0,
    "run_dir": 1,
    "normalization": 1,
    "tokenizers": 2,
    "assets": 3,
    "data": 3,
    "sequences": 4,
    "tasks": 5,
    "pipeline": 6,
    "models": 1,
    "integrity": 7,
    "checkpoints": 7,
    "adapters": 7,
    "simulators": 7,
    "training": 8,
    "inference": 9,
    "interop": 10,
    "serving": 10,
    "evaluation": 10,
    "planning": 10,
    "benchmarks": 11,
}
COMMAND_RANK = 12
FOREIGN = {
    "torch",
    "transformers",
    "tensorflow",
    "lerobot",
    "libero",
    "robosuite",
    "mujoco",
    "gym_aloha",
}


def imported_modules(path: pathlib.Path, *, top_level: bool = False) -> set[str]:
    """Names of the modules a file imports; only those outside functions if ``top_level``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room(module: str) -> str | None:
    """The room of a module of the package, None for other modules."""
    parts = module.split(".")
    inside = parts[0] == "univla_jax" and len(parts) > 1 and parts[1] != "__version__"
    return parts[1] if inside else None


def rank(name: str) -> int:
    """How far to the right a room stands; commands stand at the end."""
    return RANKS.get(name, COMMAND_RANK)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path):
    own = rank(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    for module in imported_modules(path):
        target = room(module)
        if target is not None and target != "cli":
            assert rank(target) <= own, f"{path.name} imports {module}, a room to its right"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_not_imported_at_the_top(path):
    tops = {module.split(".")[0] for module in imported_modules(path, top_level=True)}
    assert not tops & FOREIGN


def test_models_know_nothing_of_robots():
    for path in (PACKAGE / "models").rglob("*.py"):
        rooms = {room(m) for m in imported_modules(path)} - {None}
        assert rooms <= {"models", "errors", "config"}, path


def test_commands_are_the_only_modules_at_the_root():
    contracts = {"__init__", "cli", *RANKS}
    for path in PACKAGE.glob("*.py"):
        if path.stem not in contracts:
            assert "def main(" in path.read_text(encoding="utf-8"), path


def test_inference_imports_nothing_of_training():
    for path in (PACKAGE / "inference").rglob("*.py"):
        assert "training" not in {room(m) for m in imported_modules(path)}, path


def test_no_two_modules_have_the_same_name():
    names = [path.stem for path in FILES if path.stem != "__init__"]
    assert sorted(names) == sorted(set(names))


def test_imports_form_no_circle():
    """Those inside functions and under ``TYPE_CHECKING`` included."""
    module_of = {_module_name(path): path for path in FILES}
    imports = {
        name: {target for target in map(_known(module_of), imported_modules(path)) if target}
        - {name}
        for name, path in module_of.items()
    }
    sorter = graphlib.TopologicalSorter(imports)
    sorter.prepare()  # raises CycleError, which names the circle


def _module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _known(module_of):
    """The module that an imported name belongs to: itself, or the one that defines it."""

    def find(name: str) -> str | None:
        parent = name.rpartition(".")[0]
        return name if name in module_of else parent if parent in module_of else None

    return find
