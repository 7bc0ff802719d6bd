"""The package as others install it: a wheel, built here and used from another folder."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import ghostEngines

ROOT = Path(__file__).parent.parent
PACKAGES = ("ghostEngines", "score_store", "attribution", "data_processing", "foundation")
EXTRAS = (
    "transformers",
    "huggingface_hub",
    "tiktoken",
    "tokenizers",
    "backports",
    "safetensors",
    "wandb",
)
# Of a checkout: they make a tokenizer, and demo data.
NEED_EXTRAS = {f"data_processing.{name}" for name in ("train_tokenizer", "demo_corpus", "llava_demo")}
INTEGRATIONS = "ghostEngines.integrations."  # of libraries
IMPORT_ALL = f"""
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys({EXTRAS!r})  # as if they were not installed
for package in {PACKAGES!r}:
    path = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(path, package + ".", onerror=str):
        if module.name not in {NEED_EXTRAS!r} and not (
            module.name.endswith("__main__") or module.name.startswith({INTEGRATIONS!r})
        ):
            importlib.import_module(module.name)
            print(module.name)
"""
SCORE = """
import ghostEngines, torch
from ghostEngines import GradDotProdEngine, per_sample_losses
model, x, y = torch.nn.Linear(3, 5), torch.randn(4, 3), torch.arange(4)
with GradDotProdEngine(model, 1) as engine:
    engine.joint_loss(per_sample_losses(model, x, y)).backward()
    engine.prepare_gradients()
    print(len(engine.dot_products()))
print(ghostEngines.__file__)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install` of the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    ignored = ignore_patterns(
        ".*", "data", "results", "build", "*.egg-info", "__pycache__", "tests", "benchmarks"
    )
    copytree(ROOT, source, ignore=ignored)
    pip("wheel", source, "--no-build-isolation", "--wheel-dir", folder)
    (wheel,) = folder.glob("*.whl")
    pip("install", wheel, "--target", folder / "site")
    return folder / "site"


def pip(*arguments: object) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        *map(str, arguments),
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def python(site: Path, *arguments: str) -> str:
    """Run Python in another folder, where the package is installed."""
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=site.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_step_is_scored(site: Path) -> None:
    count, file = python(site, "-c", SCORE).splitlines()
    assert count == "3" and Path(file).is_relative_to(site)


def test_one_version_and_types(site: Path) -> None:
    (metadata,) = site.glob("*.dist-info")
    assert Distribution.at(metadata).version == ghostEngines.__version__
    assert all((site / package / "py.typed").exists() for package in PACKAGES)
    assert sorted(path.name for path in site.iterdir() if path.suffix != ".dist-info") == sorted(PACKAGES)


def test_modules_need_no_extra(site: Path) -> None:
    found = python(site, "-c", IMPORT_ALL).split()
    assert {name.partition(".")[0] for name in found} == set(PACKAGES) and len(found) > 100


@pytest.mark.parametrize("tool", ["attribution.report", "ghostEngines.verify"])
def test_tools_are_commands(site: Path, tool: str) -> None:
    assert "usage:" in python(site, "-m", tool, "--help")


def test_what_an_extra_is_needed_for(site: Path) -> None:
    code = """
import sys
sys.modules["tiktoken"] = None
from data_processing.tokenizers import get_tokenizer
try:
    get_tokenizer("gpt2")
except ValueError as error:
    print(error)
"""
    assert python(site, "-c", code).startswith(
        "tiktoken is not installed: pip install 'ghost-engines[train]'"
    )


def test_the_checkout_has_the_same_versions() -> None:
    """Of what requirements.txt and the package both name; PyTorch's is one that the package takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line.partition("#")[0].strip() for line in lines} - {""}
    assert "torch>=2.11" in project["dependencies"]
    of_package = {*project["dependencies"], *project["optional-dependencies"]["train"]} - {"torch>=2.11"}
    assert required - of_package == {"torch==2.13.0"} and of_package <= required
    # A Trainer needs accelerate, which the scripts do not.
    dev = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert set(project["optional-dependencies"]["transformers"]) <= of_package | {
        line for line in dev if line.startswith("accelerate")
    }
