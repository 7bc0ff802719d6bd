"""Checkpoints of a run: {result_dir}/checkpoints/step_NNNNNN/, each whole or not there.

    model.safetensors, config.json   the model in Hugging Face format, for GPT2LMHeadModel.from_pretrained
    trainer_state.pt                 optimizer, gradient scaler, random number generators, progress
    run_config.json                  the run's configuration
    manifest.json                    step, and size and SHA-256 of each file, its own included

Written under a hidden name, synced, renamed; the symbolic link {result_dir}/model leads to the newest. A
checkpoint is removed only after a newer one is whole. Optimizer states go by parameter name (PyTorch's
torch.distributed.checkpoint.state_dict), so that another number of processes, or FSDP in place of DDP, can
load them.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from foundation.errors import ConfigError, file_errors
from foundation.files import sync, written_whole
from score_store.run_folder import RunFolder

FORMAT = 1
NAME = re.compile(r"step_(\d{6,})")
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.pt"
RUN_CONFIG = "run_config.json"
COPIED_MODEL = ".model.copy.tmp"  # the copy that was in the link's place, until it is removed

logger = logging.getLogger(__name__)


class CheckpointError(ConfigError):
    """There is no checkpoint, or it is not what was written."""


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in {result_dir}/checkpoints, by step.

    Raises CheckpointError if the folder cannot be read.
    """
    with file_errors(folder, CheckpointError):
        found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def find_checkpoint(folder: Path, name: str | None) -> Path:
    """Return the newest checkpoint in {result_dir}/checkpoints, or the one of this name.

    Raises CheckpointError if it does not exist.
    """
    there = list_checkpoints(folder)
    names = ", ".join(path.name for path in there) or "none"
    if name is None:
        if not there:
            raise CheckpointError(
                f"--resume: there is no checkpoint in {folder}: the run was stopped before the first one; "
                "start it anew with --resume auto, which sets it aside, or with --overwrite"
            )
        return there[-1]
    if folder / name not in there:
        raise CheckpointError(f"--resume_from {name}: not in {folder}, which has {names}")
    return folder / name


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, after comparing all its files with their checksums.

    Raises:
        CheckpointError: a file is missing or damaged (the message names it and the checkpoint before this one), may not
            be read, or was written by another version of this program.
    """
    try:
        manifest = _verified(checkpoint)
    except PermissionError as error:
        raise CheckpointError(f"checkpoint {checkpoint} may not be read: {error}") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        there = list_checkpoints(checkpoint.parent)
        before = [path.name for path in there if step_of(path) < step_of(checkpoint)]
        advice = (
            f"--resume_from {before[-1]} resumes from the one before it" if before else "there is no other"
        )
        raise CheckpointError(f"checkpoint {checkpoint} is damaged: {error}; {advice}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {checkpoint} has the format {manifest.get('format')}, this program reads {FORMAT}: "
            "another version of this program wrote it; resume with that version"
        )
    return manifest


def _verified(folder: Path) -> dict[str, Any]:
    """Return the manifest in a folder. Raises ValueError, OSError, ... unless it and its files are as written."""
    manifest = _parsed((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest.pop("sha256") != _hash_of_manifest(manifest):
        raise ValueError(f"the checksum of {MANIFEST} is not that of what was written")
    for name, want in manifest["files"].items():
        size = (folder / name).stat().st_size
        if size != want["bytes"]:
            raise ValueError(f"{name} has {size} bytes, {want['bytes']} were written")
        if sha256_of(folder / name) != want["sha256"]:
            raise ValueError(f"the checksum of {name} is not that of what was written")
    return manifest


def _parsed(text: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is not JSON ({error})") from error
    return manifest


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_manifest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], facts: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of a step to {result_dir}/checkpoints, then remove all but the newest `keep`.

    Args:
        write: puts its files into an empty folder.
        facts: go into the manifest.

    Raises:
        CheckpointError: it cannot be written (disk full, ...); earlier checkpoints are complete.
    """
    final = folder / checkpoint_name(step)
    folder.mkdir(exist_ok=True)
    _clear(folder)
    try:
        with written_whole(final) as hidden:
            hidden.mkdir()
            write(hidden)
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                for path in sorted(hidden.iterdir())
            }
            manifest = {"format": FORMAT, "step": step, "files": files, **facts}
            manifest["sha256"] = _hash_of_manifest(manifest)
            (hidden / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:  # of Python, of PyTorch, of safetensors
        raise CheckpointError(
            f"cannot write {final}: {error}; the checkpoints that were there before are whole"
        ) from error
    _point_to(final)
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    logger.info("checkpoint: %s", final)
    return final


def remove_after(checkpoint: Path) -> None:
    """Remove the checkpoints of later steps, which a run that resumes from this one writes again.

    What a killed run left unfinished is removed, too. Raises as `check_model_link`.
    """
    _clear(checkpoint.parent)
    _point_to(checkpoint)
    for path in list_checkpoints(checkpoint.parent):
        if step_of(path) > step_of(checkpoint):
            logger.info("%s is removed: the run resumes from an earlier one", path)
            _remove(path)


def _clear(folder: Path) -> None:
    """Remove checkpoints that are unfinished, or whose removal was interrupted."""
    for left in folder.glob(".*.tmp"):
        shutil.rmtree(left)


def _remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then delete it: a folder with a checkpoint's name is complete at any moment."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _point_to(checkpoint: Path) -> None:
    """Make {result_dir}/model a link to a checkpoint, also where a copy of a checkpoint stands.

    Raises CheckpointError if that fails; what stood there before stays.
    """
    link = RunFolder(checkpoint.parent.parent).model
    new, copy = link.with_name(".model.tmp"), link.with_name(COPIED_MODEL)
    if copy.exists():  # of a run that was killed in here
        shutil.rmtree(copy)
    check_model_link(link)
    with file_errors(link, CheckpointError):
        try:
            new.unlink(missing_ok=True)
            new.symlink_to(checkpoint.relative_to(link.parent))
            if link.is_dir() and not link.is_symlink():
                link.rename(copy)
            os.replace(new, link)
        except OSError:
            new.unlink(missing_ok=True)
            if copy.exists():
                copy.rename(link)
            raise
        sync(link.parent)
        if copy.exists():
            shutil.rmtree(copy)


def find_saved_model(link: Path) -> Path:
    """Return {result_dir}/model.

    Raises CheckpointError if it leads nowhere although there are checkpoints, as in a copy without links.
    """
    there = list_checkpoints(RunFolder(link.parent).checkpoints)
    with file_errors(link, CheckpointError):
        led = link.is_dir()
    if there and not led:
        raise CheckpointError(
            f"there is no saved model in {link}, which is the symbolic link to the newest checkpoint: put it "
            f"back with `ln -sfn checkpoints/{there[-1].name} {link}`"
        )
    return link


def check_model_link(link: Path) -> None:
    """Raise CheckpointError unless `link` may be replaced by a link.

    It may if it is a link, does not exist, or is what a copy without symbolic links makes of one: a copy of
    a checkpoint, or a file with the link's text.
    """
    if link.is_symlink() or not link.exists():
        return
    if link.is_file():
        with link.open("rb") as file:
            if file.read(100).startswith(b"checkpoints/step_"):
                return
        reason: str | None = "it is a file"
    else:
        reason = _no_copy(link)
        if reason is None:
            return
    raise CheckpointError(
        f"{link} is neither the link to the newest checkpoint nor a copy of a checkpoint ({reason}): move it "
        "away; the run makes the link again"
    )


def _no_copy(folder: Path) -> str | None:
    """Return why a folder is no copy of one of the run's checkpoints, file by file; None if it is one."""
    try:
        files = _verified(folder)["files"]
        manifest = (folder / MANIFEST).read_bytes()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"it is not whole: {error}"
    if more := {path.name for path in folder.iterdir()} - files.keys() - {MANIFEST}:
        return f"it has {', '.join(sorted(more))}, too"
    checkpoints = list_checkpoints(RunFolder(folder.parent).checkpoints)
    if manifest not in [
        (path / MANIFEST).read_bytes() for path in checkpoints if (path / MANIFEST).is_file()
    ]:
        return "checkpoints/ has no such checkpoint"
    return None


def model_state(model: nn.Module, *, sharded: bool) -> dict[str, Any]:
    """Return all parameters of the model by name.

    Those of a sharded model are gathered on rank 0; every process must call this.
    """
    return get_model_state_dict(model, options=_options(sharded))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool) -> dict[str, Any]:
    """Return the optimizer's state by parameter name, gathered as in `model_state`."""
    return get_optimizer_state_dict(model, optimizer, options=_options(sharded))


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, sharded: bool
) -> None:
    """Load an optimizer's state, which every process has in full."""
    set_optimizer_state_dict(model, optimizer, state, options=_options(sharded))


def _options(sharded: bool) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=sharded)


def random_state() -> dict[str, Any]:
    """Return the states of all random generators. Training draws no random numbers; a later version may."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.copy()), *rest),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the states of all random generators; those of GPUs only if there are as many as before."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
