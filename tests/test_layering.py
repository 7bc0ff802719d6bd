"""Imports go downwards only, and the rooms do without the root."""

import ast
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parent.parent

# From the top; a module or room imports from lower lines only.
LEVELS = (
    ("main",),
    ("training_loop",),
    ("evaluation",),
    ("model_setup", "dataloader"),
    ("llava_dataloader", "config_file"),
    ("run",),
    ("attribution", "models"),
    ("ghostEngines",),
    ("score_store",),
    ("data_processing",),
    ("foundation",),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
MODULES = sorted(
    path for path in [*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))]
)


def imports(path: Path, *, types_too: bool = False) -> set[str]:
    """Full names of what a file imports, relative ones with dots: {"torch.nn.Module", "..losses.require"}.

    types_too: also what only a type checker imports, in `if TYPE_CHECKING:`."""
    found = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types_too:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {f"{module}.{alias.name}" for alias in node.names}
        todo += ast.iter_child_nodes(node)
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def files_of(room: str) -> list[Path]:
    return [path for path in MODULES if room_of(path) == room]


def test_every_module_has_its_level() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} | set(ROOMS) == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_below(path: Path) -> None:
    for name in imports(path):
        if top(name) in LEVEL and top(name) != room_of(path):
            assert LEVEL[top(name)] > LEVEL[room_of(path)], f"{path.name} imports {name}"


def test_rooms_name_types_of_the_root_for_the_type_checker_alone() -> None:
    """The configuration and what is made from it go through run/ as they are."""
    for room in ROOMS:
        names = {name for path in files_of(room) for name in imports(path, types_too=True)}
        upward = {name for name in names if top(name) in LEVEL and LEVEL[top(name)] < LEVEL[room]}
        allowed = {"config_file.TrainingConfig", "dataloader.TrainingData"}
        assert upward <= (allowed if room == "run" else set()), (room, upward)


def test_rooms_are_imported_without_the_root(tmp_path: Path) -> None:
    for room in ROOMS:
        copytree(ROOT / room, tmp_path / room, ignore=ignore_patterns("__pycache__"))
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ROOMS
        for path in files_of(room)
        if path.name != "__main__.py" and path != ROOT / "ghostEngines" / "verify.py"
    ]
    code = f"import importlib, sys; sys.path[0] = {str(tmp_path)!r}; [importlib.import_module(n) for n in {names}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_foundation_needs_nothing_but_python_and_a_progress_bar() -> None:
    names = {top(name) for path in files_of("foundation") for name in imports(path)}
    assert names <= sys.stdlib_module_names | {"foundation", "tqdm"}


def test_the_engine_needs_torch_alone() -> None:
    """The manager writes scores; numpy's random state is watched by the guard. Each integration is of a library."""
    integrations = ROOT / "ghostEngines" / "integrations"
    for path in files_of("ghostEngines"):
        if integrations in path.parents:
            assert not {top(name) for name in imports(path)} & (
                LEVEL.keys() - {"score_store", "foundation"}
            ), path
            continue
        others = {top(name) for name in imports(path)} - sys.stdlib_module_names - {"", "ghostEngines"}
        more = {"score_store"} if path.name == "engine_manager.py" else set()
        assert others <= {"torch", "numpy", "foundation"} | more, path


def test_attribution_reads_what_training_wrote() -> None:
    """Without anything that trains."""
    names = {top(name) for path in files_of("attribution") for name in imports(path)}
    assert names & LEVEL.keys() <= {"attribution", "score_store", "data_processing", "foundation"}
    assert "transformers" not in names


def test_the_oracle_shares_no_code_with_what_it_judges() -> None:
    names = {top(name) for name in imports(ROOT / "benchmarks" / "oracle.py")}
    assert names == {"torch", "collections", "dataclasses"}
