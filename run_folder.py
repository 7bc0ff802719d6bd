"""The folder of a run, {results_dir}/{run_name}: made once, marked by config.json, kept from other runs.

prepare_result_dir(config)
save(config, config.result_dir / "config.json", provenance())
"""

import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from config_file import ROOT, ConfigError, TrainingConfig

PACKAGES = ("torch", "numpy", "transformers", "tiktoken", "pyarrow", "wandb")  # whose versions are recorded

logger = logging.getLogger(__name__)


def check_result_dir(config: TrainingConfig) -> None:
    """What can be said before anything is loaded or made.

    Raises:
        ConfigError: the name is taken; --eval_only of a run that is not there, or that has another
        architecture.
    """
    if config.eval_only:
        if config.saved_model is not None:
            _check_saved_run(config)
    elif os.path.lexists(config.result_dir) and not config.overwrite:
        raise ConfigError(
            f"--run_name {config.run_name}: {config.result_dir} is there already; choose another name, or "
            "replace that run with --overwrite"
        )


def differences(config: TrainingConfig) -> list[str]:
    """In what the evaluation of a saved run differs from that run, of what its losses depend on."""
    if config.saved_model is None:
        return []
    values = _read_run(config.result_dir)
    assert values is not None
    names = (
        "block_size",
        "pile_data_dir",
        "train_set",
        "val_set",
        "test_set",
        "domains",
        "eval_iter",
        "eval_bs",
        "seed",
    )
    return [
        f"{name} is {getattr(config, name)}, was {values[name]}"
        for name in (*names, "model_dtype", "train_dtype")
        if getattr(config, name) != values[name]
    ]


def prepare_result_dir(config: TrainingConfig) -> None:
    """Make the run's folder, empty; with --eval_only make nothing.

    Raises:
        ConfigError: what `check_result_dir` raises; --overwrite of what is not a run; a folder that cannot be
        made.
    """
    check_result_dir(config)
    if config.eval_only:
        return
    folder = config.result_dir
    if os.path.lexists(folder):
        _remove_run(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"--results_dir {config.results_dir}: cannot make {folder} ({error.strerror}); name a folder "
            "that can be written, with --results_dir or RESULTS_DIR"
        ) from error


def save(config: TrainingConfig, path: Path, extra: Mapping[str, Any]) -> None:
    """Write config.json: every field as resolved, `resolved_from`, and what is in `extra`."""
    values = asdict(config)
    assert not values.keys() & extra.keys(), values.keys() & extra.keys()
    text = json.dumps({**values, **extra}, indent=2, allow_nan=False)
    # Its presence marks the folder as a run, so it appears whole or not at all.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def provenance() -> dict[str, Any]:
    """What a run depends on besides its configuration. Version None: the package is not installed."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(ROOT),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    """Hash of the commit that is checked out, with "-dirty" after it where tracked files differ from it."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except FileNotFoundError:
        reason = "git is not installed"
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip()
    logger.warning("config.json records no git commit: %s", reason)
    return None


def _read_run(folder: Path) -> dict[str, Any] | None:
    """The config.json of a run; None where there is none, or another's (a saved model has one, too)."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(values, dict) and {"method", "run_name", "resolved_from"} <= values.keys()
    return values if ours else None


def _check_saved_run(config: TrainingConfig) -> None:
    values = _read_run(config.result_dir)
    if values is None:
        raise ConfigError(
            f"--eval_only --run_name {config.run_name}: {config.result_dir} is not the folder of a run; "
            "check --run_name and --results_dir"
        )
    if values["architecture"] != config.architecture:
        raise ConfigError(
            f"--architecture {config.architecture}: the model of run {config.run_name} is another; "
            f"give --architecture {values['architecture']}"
        )


def _remove_run(folder: Path) -> None:
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.is_symlink() or not (empty or _read_run(folder)):
        raise ConfigError(
            f"--overwrite: {folder} is not the folder of a run (it has no config.json of one) and is left as "
            "it is; choose another --run_name, or remove it by hand"
        )
    for entry in folder.iterdir():
        if entry.name == "config.json":
            continue  # last: interrupted before that, the folder is still known as a run
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    shutil.rmtree(folder)
