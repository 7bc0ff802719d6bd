"""Imports go downwards only."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top; a module imports from lower lines only.
LEVELS = (
    ("main",),
    ("summary",),
    ("attribution",),
    ("training_loop",),
    ("evaluation", "training_state", "run_parts"),
    ("training_data", "run_log", "run_folder", "validation_rows", "finite_guard"),
    ("checkpoint",),
    ("model_setup", "dataloader"),
    ("distributed", "interrupts", "file_system", "pretrained"),
    ("config_file", "batch_order"),
    ("domain_lists",),
    ("command_line",),
    ("ghostEngines", "data_processing"),
    ("foundation",),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path for path in ROOT.glob("*.py"))
ENGINE = sorted((ROOT / "ghostEngines").rglob("*.py"))
ATTRIBUTION = sorted((ROOT / "attribution").rglob("*.py"))
DATA = sorted((ROOT / "data_processing").rglob("*.py"))
FOUNDATION = sorted((ROOT / "foundation").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, relative ones with dots: {"torch.nn.Module", "..losses.require"}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_has_its_level() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {path.stem for path in MODULES} | packages == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_from_below(path: Path) -> None:
    for name in imports(path):
        if top(name) in LEVEL:
            assert LEVEL[top(name)] > LEVEL[path.stem], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", ENGINE + DATA, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_nothing_else_of_the_project(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert {top(name) for name in imports(path)} & LEVEL.keys() <= {package, "foundation"}


@pytest.mark.parametrize("path", FOUNDATION, ids=lambda path: path.stem)
def test_the_foundation_needs_nothing_but_python(path: Path) -> None:
    assert {top(name) for name in imports(path)} <= sys.stdlib_module_names | {"foundation"}


@pytest.mark.parametrize("path", ATTRIBUTION, ids=lambda path: path.stem)
def test_attribution_reads_what_training_wrote(path: Path) -> None:
    """Without anything that trains."""
    lower = {"attribution", "dataloader", "domain_lists", "ghostEngines", "data_processing", "foundation"}
    assert {top(name) for name in imports(path)} & LEVEL.keys() <= lower


def test_the_engine_knows_transformers_for_one_layer_alone() -> None:
    found = {name for path in ENGINE for name in imports(path) if top(name) == "transformers"}
    assert found == {"transformers.pytorch_utils.Conv1D"}


def test_the_oracle_shares_no_code_with_what_it_judges() -> None:
    names = {top(name) for name in imports(ROOT / "benchmarks" / "oracle.py")}
    assert names == {"torch", "collections", "dataclasses"}
