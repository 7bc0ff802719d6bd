"""Write the scores and samples of any training loop, so that the tools of `attribution` read them.

    with write_run("results/mine", optimizer="AdamW", direction="auto", validation=rows) as run:
        for step, batch in enumerate(batches):
            ...                                     # the loop's own step, with GradDotProdEngine
            run.samples.append(Sample(i, text, tokens) for i, text, tokens in batch)
            run.append(step=step, sample_ids=ids, dot_products=dots, train_losses=losses, val_loss=loss, lr=lr,
                       clip_factor=factor, global_batch_size=n)

Every process of the loop opens the same folder and appends its own rows. A checkpoint of step k is written after
flush(); write_run(..., resume_from=k) then goes on with it, also after kill -9.
"""

import json
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from torch import Tensor

from foundation.errors import file_errors
from foundation.files import remove, sync, write_text, written_whole
from foundation.granularity import Granularity
from score_store.files import list_files
from score_store.run_folder import RunFolder
from score_store.samples import ONE_GROUP, OWN, Sample, SampleWriter
from score_store.schema import ScoreError, ValueKind, score_schema
from score_store.validation_rows import hash_of_samples, save_validation_samples
from score_store.writer import ExactRows, ScoredStep, ScoreWriter, drop_rows_from, open_scores

METHOD = "own loop"  # in config.json, in the place of a method of main.py
VALIDATION = "the loop's own"  # the same, of the set of validation rows


@dataclass(frozen=True)
class Processes:
    """The processes of a loop, as one of them sees them.

    rank: its number, from 0.
    barrier: returns once all processes have called it.
    """

    rank: int
    barrier: Callable[[], object]

    @classmethod
    def of_torch(cls) -> Self:
        """Return those of torch.distributed if it is initialised, else this process alone."""
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.barrier)
        return cls(0, lambda: None)


class RunWriter:
    """The scores and samples that one process of a loop writes; `write_run` opens it.

    samples: where the loop puts the texts of its samples, at the latest in the step that scores them.
    """

    samples: SampleWriter

    def __init__(
        self,
        folder: RunFolder,
        rank: int,
        *,
        save_interval: int,
        first: int,
        width: int | None,
        identity: Mapping[str, Any],
    ) -> None:
        """Open the folder, which `write_run` has made.

        Args:
            first: the step that comes first.
            width: how many dot products a row has, if that is known: m of "pairwise", L of "per_layer".
            identity: of ScoreWriter.
        """
        self.samples = SampleWriter(folder.samples, rank=rank)
        self.scores = ScoreWriter(folder.scores, rank=rank, **identity)
        self._save_interval, self._width = save_interval, width
        self._first = first
        self._step: int | None = None  # the last one appended
        self._waiting = 0  # steps that are not on the disk

    def append(
        self,
        *,
        step: int,
        sample_ids: Tensor | npt.ArrayLike,
        dot_products: Tensor,
        train_losses: Tensor,
        val_loss: Tensor | float | None,
        lr: float,
        clip_factor: Tensor | float,
        global_batch_size: int,
        groups: str | Sequence[str] = ONE_GROUP,
        row_weights: Tensor | npt.ArrayLike | None = None,
        null: Tensor | bool = False,
        exact: ExactRows | None = None,
    ) -> None:
        """Buffer the scores of n rows. They are on the disk after save_interval steps, flush() or close().

        A row's value is lr · clip_factor · row_weight · dot_product, in nats; positive helps.

        Args:
            step: from 0, without gaps; several calls with one step are its micro-batches.
            sample_ids: (n,) the dataset's row indices, or a column of integers that tells its rows apart.
            dot_products: (n,), as the engine gives them; with granularity "pairwise" (n, m), "per_layer" (n, L),
                "token" (n, T), padded to any T.
            train_losses: (n,) the rows' losses.
            val_loss: the mean loss of the validation rows before the step; None: not known.
            lr: the largest learning rate of the optimizer's groups.
            clip_factor: what clipping multiplied the gradient by: 1 without clipping.
            global_batch_size: rows in the step's update, over all processes and micro-batches.
            groups: (n,) the sample's group, or one of all rows. Groups need not be known before; a sample has one.
            row_weights: (n,) the rows' weights in the loss; None: the loss is the mean, 1 / global_batch_size each.
            null: the optimizer skips the step, so that its rows have no values.
            exact: the exact values, in a step that has them.

        Raises:
            ScoreError: ids that are no integers of 64 bits.
            ValueError: arguments of another form, or a step that is not in order.
        """
        allowed = (self._first,) if self._step is None else (self._step, self._step + 1)
        if operator.index(step) not in allowed:
            raise ValueError(
                f"step {step} is appended where step {allowed[-1]} comes next: steps are counted from 0 (or from "
                "resume_from) without gaps, also where the optimizer skips one (null=True)"
            )
        if self._width is not None and dot_products.shape[1:] != (self._width,):
            raise ValueError(
                f"dot_products of shape {tuple(dot_products.shape)} in a run of granularity "
                f"{self.scores.granularity!r} with {self._width} of them for each row"
            )
        if step != self._step and self._waiting >= self._save_interval:
            self.flush()
        ids = integers(sample_ids)
        self.scores.append(
            ScoredStep(step, lr, clip_factor, val_loss, global_batch_size, null),
            sample_ids=ids,
            domains=[groups] * len(ids) if isinstance(groups, str) else groups,
            blocks=ids,
            dot_products=dot_products,
            train_losses=train_losses,
            row_weights=row_weights,
            exact=exact,
        )
        self._waiting += step != self._step
        self._step = step

    def flush(self) -> None:
        """Write what is buffered to the disk: samples first, so that no score is there without its sample."""
        self.samples.flush()
        self.scores.flush()
        self._waiting = 0

    def close(self) -> None:
        """Write what is buffered to the disk, in few files."""
        try:
            self.samples.close()
        finally:
            self.scores.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_run(
    folder: str | os.PathLike[str],
    *,
    optimizer: str,
    direction: Literal["auto", "gradient"],
    validation: Sequence[Sample],
    settings: dict[str, Any] | None = None,
    granularity: Granularity = "total",
    layers: Sequence[str] = (),
    values: ValueKind = "in_pass",
    by_target: bool = False,
    images: str | os.PathLike[str] | None = None,
    resume_from: int | None = None,
    processes: Processes | None = None,
    save_interval: int = 10,
) -> RunWriter:
    """Make a run's folder, or go on with one, and return the writer of this process.

    Every process of the loop calls this with the same arguments. Rank 0 makes the folder, and the others wait for it.

    Args:
        optimizer: its name, as in "AdamW".
        direction: the engine's: what the training gradients are multiplied with.
        validation: the m validation rows that the dot products refer to.
        settings: what else distinguishes the run (seed, data set, ...), as JSON; the report shows it.
        granularity, values: what the dot products are, and what a value is.
        by_target: the exact values come with their parts by target, ExactRows.by_target; needs values="exact".
        layers: with granularity "per_layer" the names of the L layers.
        images: the folder below which "image" in the metadata of a sample is the path of its image.
        resume_from: the step that comes next; scores of it and later ones are dropped. None: a new run.
        processes: of the loop; None: those of torch.distributed if it is initialised, else this one alone.
        save_interval: steps between two writes.

    Raises:
        ScoreError: a new run's folder is there; a resumed one is not, is of another run, or lacks scores of steps
            before resume_from.
    """
    place, world = RunFolder(Path(folder).resolve()), Processes.of_torch() if processes is None else processes
    config = {
        "method": METHOD,
        "run_name": place.root.name,
        "optimizer": optimizer,
        "direction": direction,
        "val_set": VALIDATION,
        "val_batch_size": len(validation),
        "images": None if images is None else str(Path(images).resolve()),
    }
    if by_target and values != "exact":
        raise ScoreError('by_target=True splits exact values: give values="exact", too')
    for name, value, known in (
        ("direction", direction, ("auto", "gradient")),
        ("values", values, get_args(ValueKind)),
    ):
        if value not in known:
            raise ScoreError(f"{name} is {value!r}: there are {', '.join(known)}")
    score_schema(granularity, by_target)
    if resume_from is not None and operator.index(resume_from) < 0:
        raise ScoreError(f"resume_from={resume_from}: steps are counted from 0")
    settings = {} if settings is None else settings
    if taken := sorted(config.keys() & settings.keys()):
        raise ScoreError(f"settings: {', '.join(taken)} is set by write_run itself; take another name")
    validation = list(validation)
    for sample in validation:
        sample.check()
    if not validation:
        raise ScoreError("validation is empty: give the rows whose loss the values are about, as samples")
    try:
        config = json.loads(
            json.dumps(config | settings, allow_nan=False)
        )  # as it is read: tuples are lists there
    except (TypeError, ValueError) as error:
        raise ScoreError(f"settings and optimizer must be what JSON has: {error}") from error
    identity: dict[str, Any] = {
        "metadata": {
            "samples": OWN,
            "run_configuration": json.dumps(
                {"optimizer": optimizer, "direction": direction, **settings}, sort_keys=True
            ),
            "validation_sha256": hash_of_samples(validation),
            "layers": json.dumps(list(layers)),
        },
        "granularity": granularity,
        "values": values,
        "by_target": by_target,
    }
    if resume_from is None:
        check_new(place)
    else:
        check_config(place, config)
    world.barrier()  # all have seen the folder as it was, and end with the same error
    try:
        if world.rank == 0 and resume_from is None:
            make_folder(place, config, validation)
        elif world.rank == 0:
            assert resume_from is not None
            check_last_step(place, resume_from)  # first: what is refused changes nothing
            drop_rows_from(place.scores, resume_from, **identity)
    finally:
        world.barrier()  # also after an error, so that no process waits for ever
    check_config(place, config)
    return RunWriter(
        place,
        world.rank,
        save_interval=save_interval,
        first=resume_from or 0,
        width={"pairwise": len(validation), "per_layer": len(layers)}.get(granularity),
        identity=identity,
    )


def check_new(place: RunFolder) -> None:
    """Raise ScoreError if there is something in the folder of a new run."""
    if os.path.lexists(place.root) and not (place.root.is_dir() and not any(place.root.iterdir())):
        raise ScoreError(
            f"{place.root} is there already: name another folder, remove it, or give resume_from=STEP to go on with "
            "the run in it"
        )


def make_folder(place: RunFolder, config: Mapping[str, Any], validation: Sequence[Sample]) -> None:
    """Make the folder of a new run, whole or not at all. Raises ScoreError if it cannot be written."""
    with file_errors(place.root, ScoreError):
        place.root.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(place.root) as hidden:
            remove(hidden)  # left by a process that was killed
            hidden.mkdir()
            unfinished = RunFolder(hidden)
            save_validation_samples(validation, unfinished.validation_rows)
            sync(unfinished.validation_rows)
            write_text(unfinished.config, json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def check_config(place: RunFolder, config: Mapping[str, Any]) -> None:
    """Raise ScoreError unless the folder is there and its config.json is this one."""
    if not place.config.is_file():
        raise ScoreError(
            f"{place.root} has no config.json: there is no run to go on with (leave out resume_from), or rank 0 could "
            "not make it, and its error says why"
        )
    with file_errors(place.config, ScoreError):
        found = json.loads(place.config.read_text(encoding="utf-8"))
    for name in sorted(
        (found.keys() | config.keys()) - {"run_name"}
    ):  # the folder may be another place by now
        if found.get(name) != config.get(name):
            raise ScoreError(
                f"{place.config} has {name} {found.get(name)!r:.200}, this run {config.get(name)!r:.200}: it is of "
                "another run; give its settings, or name another folder"
            )


def check_last_step(place: RunFolder, resume_from: int) -> None:
    """Raise ScoreError unless there are scores up to the step before resume_from, and of all processes in it."""
    with file_errors(place.scores, ScoreError):
        files = list_files(place.scores) if place.scores.is_dir() else []
    end = max((file.last for file in files), default=-1)
    if 0 < resume_from <= end + 1:
        own = pc.field("step") == resume_from - 1
        last = open_scores(place.scores).to_table(["global_batch_size"], filter=own)["global_batch_size"]
        if len(last) != (want := last[0].as_py() if len(last) else 1):
            raise ScoreError(
                f"{place.scores} has scores of {len(last)} rows in step {resume_from - 1}, and its update had {want}: "
                "a process had not written it yet; let all flush() before each checkpoint, and resume from one before"
            )
    if end < resume_from - 1:
        raise ScoreError(
            f"{place.scores} has scores up to step {end}, so that steps {end + 1} to {resume_from - 1} would be "
            f"missing: resume from step {end + 1} or earlier, and flush() before each checkpoint"
        )


def integers(numbers: Tensor | npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return ids as integers of 64 bits (n,). Raises ScoreError if they are something else."""
    found = np.asarray(numbers.cpu() if isinstance(numbers, Tensor) else numbers)
    fits = found.dtype.kind == "i" or (
        found.dtype.kind == "u" and found.max(initial=0) <= np.iinfo(np.int64).max
    )
    if not fits:
        raise ScoreError(
            f"sample_ids are {found.dtype}, such as {found.ravel()[:1].tolist()}: give integers of at most 63 bits, "
            "the dataset's row indices or a column of it"
        )
    return found.astype(np.int64)
