"""The folder of a run, {results_dir}/{run_name}: made once, marked by config.json, kept from other runs.

prepare_result_dir(config, resources)
save(config, config.folder.config, provenance())
"""

import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

from foundation.errors import ConfigError, UserError, file_errors
from foundation.files import lock, write_text
from foundation.flags import flags_of
from run.checkpoint import list_checkpoints
from run.file_system import TRIAL, Space, bytes_below, check_file_system
from score_store.run_folder import RunFolder

if TYPE_CHECKING:
    from config_file import TrainingConfig

LOCK = RunFolder(Path()).lock.name
NO_SPACE = Space()
UNFINISHED = ".config.json.tmp"  # config.json while it is written
# What config.json has besides the fields of TrainingConfig: `provenance`, and main.computation.
EXTRAS = {
    "python", "platform", "packages", "git_commit", "contraction_by_layer", "tile_numel", "tile_side",
    "gpu_numel", "head_part_positions", "head_softmax_positions", "head_gpu_positions",
}  # fmt: skip
PACKAGES = ("torch", "numpy", "transformers", "tiktoken", "pyarrow", "wandb")  # whose versions are recorded

logger = logging.getLogger(__name__)


def check_result_dir(config: "TrainingConfig") -> None:
    """Check a run's folder before anything is loaded or made.

    Raises:
        ConfigError: the name is taken; --eval_only of a run that does not exist, or has another architecture.
    """
    if config.eval_only:
        if config.saved_model is not None:
            _check_saved_run(config)
    elif config.resumes:
        if _read_run(config.result_dir) is None:
            raise ConfigError(
                f"--resume --run_name {config.run_name}: {config.result_dir} is not the folder of a run; "
                "check --run_name and --results_dir"
            )
    elif config.resume == "auto":
        if os.path.lexists(config.result_dir):
            _check_is_run(config.result_dir, "--resume auto")
    elif os.path.lexists(config.result_dir) and not config.overwrite:
        raise ConfigError(
            f"--run_name {config.run_name}: {config.result_dir} is there already; choose another name, or "
            "replace that run with --overwrite, or resume it with --resume"
        )


def settle_resume(config: "TrainingConfig") -> "TrainingConfig":
    """Return the configuration with --resume auto settled: "always" if the run has a checkpoint.

    Otherwise it stays "auto", and the run begins.
    """
    if config.resume != "auto" or not os.path.lexists(config.result_dir):
        return config
    if not list_checkpoints(config.folder.checkpoints):
        return config
    resolved_from = {**config.resolved_from, "resume": "auto: the run has a checkpoint"}
    return replace(config, resume="always", resolved_from=resolved_from)


def try_result_dir(config: "TrainingConfig") -> None:
    """Check that the file system accepts a run's folder that does not exist yet.

    It tries the name, writing, locks, links and renames, and leaves nothing behind.

    Raises:
        ConfigError: the file system refuses.
    """
    folder = config.result_dir
    if os.path.lexists(folder):
        return  # its own lock is taken before anything in it changes
    there = next(parent for parent in folder.parents if os.path.lexists(parent))
    with _making(config), TemporaryDirectory(prefix=".trial-", dir=there) as trial:
        twin = Path(trial) / folder.relative_to(there)
        twin.mkdir(parents=True)
        check_file_system(twin, NO_SPACE, named=folder)


@contextmanager
def _making(config: "TrainingConfig") -> Iterator[None]:
    """Raise an OSError of the block, which makes the run's folder, as a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--results_dir {config.results_dir}: cannot make {config.result_dir} ({error.strerror}); name a "
            "folder that can be written, with --results_dir or RESULTS_DIR, or another --run_name"
        ) from error


def _lock(file: IO[str], config: "TrainingConfig") -> None:
    try:
        lock(file)
    except BlockingIOError as error:
        raise ConfigError(
            f"--run_name {config.run_name}: another process is at work in {config.result_dir}; wait for "
            "it, stop it, or choose another name"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"--results_dir {config.results_dir}: its file system locks no files ({error.strerror}), by "
            "which runs are kept out of each other's folder; choose a folder on another one"
        ) from error


def differences(config: "TrainingConfig") -> list[str]:
    """Return the settings that affect the losses and differ from the trained run's, as lines."""
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
        f"{name} is {getattr(config, name)}, "
        + (f"was {values[name]}" if name in values else "was not recorded by the version that made the run")
        for name in (*names, "model_dtype", "train_dtype")
        if name not in values or getattr(config, name) != values[name]
    ]


@contextmanager
def locked(config: "TrainingConfig") -> Iterator[None]:
    """Hold the lock of a run's folder, which exists, so that no other process works in it.

    The lock ends with the process, however that ends.

    Raises:
        ConfigError: another process holds it; the folder cannot be written, or has no locks.
    """
    with file_errors(config.folder.lock, ConfigError):
        file = (config.folder.lock).open("a")
    with file:
        _lock(file, config)
        yield


def changes(config: "TrainingConfig", checkpoint_config: Path) -> list[str]:
    """Return the settings that must not change and differ from those of a checkpoint, as lines.

    Raises ConfigError if another version of this program wrote the checkpoint's configuration.
    """
    values = _read_config(config, checkpoint_config)
    found = []
    for spec in flags_of(config):
        now = getattr(config, spec.name)
        now = list(now) if isinstance(now, tuple) else now
        if not spec.metadata["may_change"] and now != values[spec.name]:
            found.append(f"--{spec.name} is {now}, was {values[spec.name]}")
    return found


def _read_config(config: "TrainingConfig", path: Path) -> dict[str, Any]:
    """Return the configuration of a run.

    Raises ConfigError if it lacks a field that must not change, or has a field that this version does not know.
    """
    with file_errors(path, ConfigError):
        text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): copy the run's folder again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not the configuration of a run: copy the run's folder again")
    fields = {spec.name: spec.metadata["may_change"] for spec in flags_of(config)}
    lacks = sorted(name for name in fields if name not in values and not fields[name])
    unknown = sorted(values.keys() - fields.keys() - EXTRAS - {"resolved_from"})
    found = [f"it lacks {', '.join(lacks)}"] if lacks else []
    found += [f"it has {', '.join(unknown)}, which this version does not know"] if unknown else []
    if found:
        raise ConfigError(
            f"{path} is of another version of this program, {' and '.join(found)}: resume with that version "
            f"(git commit {values.get('git_commit')})"
        )
    return values


def lasting(config: "TrainingConfig") -> dict[str, Any]:
    """Return the settings that cannot change when a run resumes."""
    return {
        spec.name: getattr(config, spec.name) for spec in flags_of(config) if not spec.metadata["may_change"]
    }


def prepare_result_dir(config: "TrainingConfig", resources: ExitStack, space: Space = NO_SPACE) -> None:
    """Make the run's folder, empty, and keep others out of it for as long as the resources are held; with
    --eval_only make nothing. With --resume auto a run that is there, stopped before its first checkpoint, is
    set aside.

    Args:
        space: what the run will write.

    Raises:
        ConfigError: what `check_result_dir` raises; --overwrite of what is not a run; --resume auto of a run
        that has got a checkpoint meanwhile; a folder that cannot be made; a file system that lacks what a run
        needs. What was there before is as it was, then.
    """
    check_result_dir(config)
    if config.eval_only:
        return
    folder = config.result_dir
    if os.path.lexists(folder):
        if config.resume == "auto" and _read_run(folder) is not None:
            _set_aside(config)
        else:
            _check_is_run(folder, "--resume auto" if config.resume == "auto" else "--overwrite")
            resources.enter_context(locked(config))
            check_file_system(folder, space, bytes_below(folder))
            _empty_run(folder)
            return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with _making(config):
        folder.mkdir(parents=True)
    try:
        check_file_system(folder, space)
    except UserError:
        for each in made:
            each.rmdir()
        raise
    resources.enter_context(locked(config))


def _set_aside(config: "TrainingConfig") -> None:
    """Give a run without a checkpoint another name: it cannot resume, but may have scores."""
    folder = config.result_dir
    with locked(config), file_errors(folder, ConfigError):
        if list_checkpoints(config.folder.checkpoints):
            raise ConfigError(
                f"--resume auto: {folder} has got a checkpoint from another process; start again to resume "
                "from it"
            )
        names = (folder.with_name(f"{folder.name}.stopped-{number}") for number in count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        folder.rename(aside)
    logger.info("%s has no checkpoint to resume from: it is now %s, and the run begins", folder, aside)


def save(config: "TrainingConfig", path: Path, extra: Mapping[str, Any]) -> None:
    """Write config.json: every field as resolved, `resolved_from`, and what is in `extra`."""
    values = asdict(config)
    assert not values.keys() & extra.keys(), values.keys() & extra.keys()
    text = json.dumps({**values, **extra}, indent=2, allow_nan=False)
    with file_errors(path, ConfigError):  # its presence marks the folder as a run
        write_text(path, text + "\n", path.with_name(UNFINISHED))


def provenance(checkout: Path) -> dict[str, Any]:
    """Return what a run depends on besides its configuration. A version is None where the package is not installed."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(checkout),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    """Return the hash of the commit that is checked out, with "-dirty" after it where tracked files differ from it."""
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
    """Return the config.json of a run; None if there is none, or it is of something else, as of a saved model.

    Raises ConfigError if it cannot be read.
    """
    path = RunFolder(folder).config
    with file_errors(path, ConfigError):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
            return None
    ours = isinstance(values, dict) and {"method", "run_name", "resolved_from"} <= values.keys()
    return values if ours else None


def _check_saved_run(config: "TrainingConfig") -> None:
    values = _read_run(config.result_dir)
    if values is None:
        raise ConfigError(
            f"--eval_only --run_name {config.run_name}: {config.result_dir} is not the folder of a run; "
            "check --run_name and --results_dir"
        )
    if "architecture" not in values:
        raise ConfigError(
            f"{config.result_dir}/config.json has no architecture: another version of this program wrote it; "
            "evaluate the run with that version"
        )
    if values["architecture"] != config.architecture:
        raise ConfigError(
            f"--architecture {config.architecture}: the model of run {config.run_name} is another; "
            f"give --architecture {values['architecture']}"
        )


def _check_is_run(folder: Path, flag: str) -> None:
    # of a run that was killed before it had its config.json, no more than these is there
    with file_errors(folder, ConfigError):
        empty = folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {LOCK, UNFINISHED, TRIAL}
    if folder.is_symlink() or not (empty or _read_run(folder)):
        raise ConfigError(
            f"{flag}: {folder} is not the folder of a run (it has no config.json of one) and is left as "
            "it is; choose another --run_name, or remove it by hand"
        )


def _empty_run(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name in (RunFolder(folder).config.name, LOCK):
            continue  # config.json last: interrupted before that, the folder is still known as a run
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    RunFolder(folder).config.unlink(missing_ok=True)
