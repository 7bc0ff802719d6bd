"""The scores of a run on disk: their columns, the writer and the readers.

A folder of Parquet files with one row per training sample and step, and nothing else, so that
`pandas.read_parquet(folder)` and `pyarrow.dataset.dataset(folder)` just open it. score_files.py says
what is sure after a crash.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import torch
from torch import Tensor

from foundation.errors import file_errors
from foundation.files import sync
from foundation.granularity import Granularity, total_of
from score_store.files import (
    ScoreFile,
    check_origin,
    list_files,
    put_in_order,
    put_in_place,
    read_origin,
    remove,
    score_file,
    superseded,
)
from score_store.schema import (
    BY_TARGET,
    FORMAT,
    LACKING,
    OF_STEP,
    SCORE_SCHEMA,
    TARGET_COLUMN,
    ScoreError,
    ValueKind,
    score_schema,
)

__all__ = [
    "SCORE_SCHEMA",
    "ExactRows",
    "ScoreError",
    "ScoreWriter",
    "ScoredStep",
    "drop_rows_from",
    "open_scores",
]

ROUNDING = 1e-3  # of a value that was added up in half precision, relative to the sum of its parts' sizes


@dataclass(frozen=True)
class ExactRows:
    """The exact values of the rows of one append(), and what else made the validation loss fall in the step."""

    values: Tensor  # (n,), in nats; NaN for a row without one
    of_batch: float  # Σ values of the global batch
    momentum: float
    decay: float
    measured_fall: float
    cosine: float
    by_target: Tensor | None = None  # (n, T) the parts of each value by target, of a run that keeps them

    def copied(self) -> Self:
        """Return the same with tensors of its own, whose buffers the caller may reuse."""
        parts = None if self.by_target is None else _copy(self.by_target)
        return replace(self, values=_copy(self.values), by_target=parts)


@dataclass(frozen=True)
class ScoredStep:
    """What the scores of all rows of an optimizer step share."""

    step: int  # its number, from 0
    lr: float
    clip_factor: Tensor | float  # what clipping multiplied the gradient by, at most 1
    val_loss: (
        Tensor | float | None
    )  # L_val, the mean loss of the validation rows before the step; None: not known
    global_batch_size: int  # samples in the update, over all processes and micro-batches
    null: Tensor | bool = False  # the optimizer does not step, so there is no dot product and no value


@dataclass(frozen=True)
class _Rows:
    """The n rows of one append(), on the device they came from."""

    step: int
    sample_ids: npt.NDArray[np.int64]  # (n,)
    domains: Sequence[str]  # (n,)
    blocks: npt.NDArray[np.int64]  # (n,)
    dot_products: Tensor  # (n,)
    train_losses: Tensor  # (n,)
    row_weights: Tensor  # (n,)
    val_loss: Tensor  # NaN if it is not known
    lr: float
    clip_factor: Tensor
    global_batch_size: int
    null: Tensor
    exact: ExactRows | None


class ScoreWriter:
    """Writes the scores of one process of a run into `folder`, which all processes of the run share.

    by_target: exact values come with their parts by target, which get a column of their own.

    `metadata` distinguishes runs (configuration, validation rows, shard checksums, ...) and goes into every
    file; what may change when a run is resumed does not belong in it. Opening the folder puts in order what
    this rank's last writer left when it was killed. As a context manager it closes itself, also after an
    exception.

    Raises:
        ScoreError: the folder holds something else than scores of this run.
            A file cannot be written (disk full, ...): earlier files are whole, the rows stay buffered.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rank: int,
        metadata: Mapping[str, str],
        granularity: Granularity = "total",
        values: ValueKind = "in_pass",
        by_target: bool = False,
        rows_per_file: int = 100_000,
    ) -> None:
        assert 0 <= rank < 100_000, rank
        assert not FORMAT.keys() & metadata.keys(), f"reserved: {FORMAT.keys()}"
        self.folder = Path(folder).resolve()
        self.rank = rank
        self.rows_per_file = rows_per_file
        self.granularity, self.values, self.by_target = granularity, values, by_target
        assert values == "exact" or not by_target, "the parts are those of exact values"
        origin = {**metadata, "granularity": granularity, "values": values, **FORMAT}
        if by_target:
            origin[BY_TARGET] = "yes"
        self._schema = score_schema(granularity, by_target).with_metadata(origin)
        self._buffer: list[_Rows] = []
        with file_errors(self.folder, ScoreError):
            self.folder.mkdir(parents=True, exist_ok=True)
            sync(self.folder.parent)
        for file in list_files(self.folder):
            try:
                check_origin(file.path, origin)
            except FileNotFoundError:  # another rank's writer put its files in order since they were listed
                assert file.rank != rank
        self._take_stock()

    def append(
        self,
        of_step: ScoredStep,
        *,
        sample_ids: npt.ArrayLike,
        domains: Sequence[str],
        blocks: npt.ArrayLike,
        dot_products: Tensor,
        train_losses: Tensor,
        row_weights: Tensor | npt.ArrayLike | None = None,
        exact: ExactRows | None = None,
    ) -> None:
        """Buffer n rows of a step. Tensors are copied on their device, and not waited for until flush().

        Args:
            of_step: its step is not before the last one appended, and after the last one written.
            sample_ids, domains, blocks: (n,) which samples.
            dot_products: (n,) <∇ℓ_i, ∇L_val>; with granularity "pairwise" (n, m), "per_layer" (n, L), "token" (n, T),
                where T may be another one in every call.
            train_losses: (n,) ℓ_i, the mean over the sample's own targets.
            row_weights: (n,) w_i, with Σ w_i ℓ_i over the global batch the loss that is minimised; None: it is the
                mean, 1 / global_batch_size each.
            exact: the exact values, in a step that has them.

        Raises:
            ValueError: arguments of different length, a step that is not in order, or exact values whose parts are
                missing, not asked for, or not their parts.
        """
        step = of_step.step
        ids, places = np.asarray(sample_ids), np.asarray(blocks)
        assert ids.dtype.kind == places.dtype.kind == "i", f"integers, not {ids.dtype} and {places.dtype}"
        per_row = dot_products.shape if self.granularity == "total" else dot_products.shape[:1]
        equal = [1 / of_step.global_batch_size] * len(domains)
        weights = torch.as_tensor(
            equal if row_weights is None else row_weights, dtype=torch.float64, device=train_losses.device
        )
        shapes = [ids.shape, (len(domains),), places.shape, per_row, train_losses.shape, weights.shape]
        if any(tuple(shape) != (len(domains),) for shape in shapes):
            raise ValueError(
                "sample_ids, domains, blocks, dot_products, train_losses and row_weights need one entry per sample "
                f"each, got shapes {', '.join(str(tuple(shape)) for shape in shapes)}"
            )
        self._check(of_step, dot_products, domains, row_weights)
        if exact is not None:
            self._check_exact(exact, len(domains))
        latest = self._buffer[-1].step if self._buffer else self._last_step
        if step < latest or (step == latest and not self._buffer):
            raise ValueError(
                f"step {step} is not in order: {self.folder} has rank {self.rank} at step {latest} already; "
                f"a run that resumes from step {step} calls drop_from({step}) first"
            )
        row = _Rows(
            step=step,
            sample_ids=ids.astype(np.int64),
            domains=tuple(domains),
            blocks=places.astype(np.int64),
            dot_products=_copy(dot_products),
            train_losses=_copy(train_losses),
            row_weights=_copy(weights),
            val_loss=_copy(
                torch.as_tensor(
                    math.nan if of_step.val_loss is None else of_step.val_loss, dtype=torch.float64
                )
            ),
            lr=of_step.lr,
            clip_factor=_copy(torch.as_tensor(of_step.clip_factor, dtype=torch.float64)),
            global_batch_size=of_step.global_batch_size,
            null=_copy(torch.as_tensor(of_step.null)),
            exact=None if exact is None else exact.copied(),
        )
        self._buffer.append(row)

    def _check(
        self,
        of_step: ScoredStep,
        dot_products: Tensor,
        domains: Sequence[str],
        row_weights: Tensor | npt.ArrayLike | None,
    ) -> None:
        """Raise ValueError for what flush() could not write, some steps later."""
        for name in ("val_loss", "clip_factor", "null"):
            value = getattr(of_step, name)
            if isinstance(value, Tensor) and value.dim() != 0:
                raise ValueError(f"{name} is of shape {tuple(value.shape)}: it is one number for the step")
        if dot_products.dim() != (1 if self.granularity == "total" else 2):
            raise ValueError(
                f"dot_products are of shape {tuple(dot_products.shape)}, in a run of granularity {self.granularity!r}"
            )
        if others := [each for each in domains if not isinstance(each, str)]:
            raise ValueError(f"a group is {others[0]!r}: groups are names")
        if row_weights is not None and not isinstance(row_weights, Tensor) and not np.min(row_weights) >= 0:
            raise ValueError(f"row_weights are {row_weights}: they must be numbers that are not negative")
        if (
            isinstance(row_weights, Tensor)
            and row_weights.device.type == "cpu"
            and not (row_weights >= 0).all()
        ):
            raise ValueError(
                f"row_weights are {row_weights.tolist()}: they must be numbers that are not negative"
            )

    def _check_exact(self, exact: ExactRows, rows: int) -> None:
        if tuple(exact.values.shape) != (rows,):
            raise ValueError(
                f"exact values of shape {tuple(exact.values.shape)} for {rows} rows: each micro-batch has its own"
            )
        if (exact.by_target is not None) != self.by_target:
            raise ValueError(
                f"ExactRows {'without' if self.by_target else 'with'} by_target, in a run with by_target="
                f"{self.by_target}: the parts by target are kept in all steps of a run, or in none"
            )
        if exact.by_target is None:
            return
        if exact.by_target.dim() != 2 or len(exact.by_target) != len(exact.values):
            raise ValueError(
                f"by_target needs the parts of each value, (n, T), got shape {tuple(exact.by_target.shape)} for "
                f"{len(exact.values)} values"
            )
        parts = exact.by_target.double()
        off = (parts.sum(1) - exact.values.double()).abs()  # NaN for a row without a value
        if (off > ROUNDING * parts.abs().sum(1)).any():
            raise ValueError(
                "by_target has parts that do not add up to the values: are they those of other rows?"
            )

    def flush(self) -> None:
        """Write what is buffered as one more file, and merge once the small files add up to a full one."""
        if not self._buffer:
            return
        first, last = self._buffer[0].step, self._buffer[-1].step
        table = self._table()
        put_in_place(score_file(self.folder, first, last, self.rank), table)
        self._buffer.clear()
        self._last_step = last
        self._small_rows += table.num_rows if table.num_rows < self.rows_per_file else 0
        if self._small_rows >= self.rows_per_file:
            self.merge()

    def merge(self) -> None:
        """Merge this rank's small files into files of at least `rows_per_file` rows, but for the last."""
        for group in self._groups(put_in_order(self.folder, self.rank)):
            table = pa.concat_tables([file.read() for file in group]).combine_chunks()
            merged = score_file(self.folder, group[0].first, group[-1].last, self.rank)
            put_in_place(merged, table, replaces=group)
        self._take_stock()

    def drop_from(self, step: int) -> None:
        """Remove this rank's rows of `step` and later, which a run that resumes there computes again.

        If it is interrupted, the rows before `step` are all there and the later ones perhaps: call it again.
        """
        assert not self._buffer, "drop_from() comes before append()"
        for file in reversed(put_in_order(self.folder, self.rank)):
            if file.first >= step:
                remove(file.path)
            elif file.last >= step:
                table = file.read()
                table = table.filter(pc.less(table["step"], step))
                last = pc.max(table["step"]).as_py()
                put_in_place(score_file(self.folder, file.first, last, self.rank), table, replaces=[file])
        sync(self.folder)
        self._take_stock()

    def close(self) -> None:
        """Write what is buffered, and merge."""
        self.flush()
        self.merge()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_stock(self) -> None:
        files = put_in_order(self.folder, self.rank)
        rows = [file.num_rows for file in files]
        self._last_step = files[-1].last if files else -1
        self._small_rows = sum(count for count in rows if count < self.rows_per_file)

    def _groups(self, files: Iterable[ScoreFile]) -> Iterator[list[ScoreFile]]:
        """Yield groups of two or more neighbouring small files, of at most `rows_per_file` rows in all."""
        group: list[ScoreFile] = []
        rows = 0
        for file in files:
            small = (count := file.num_rows) < self.rows_per_file
            if small:
                group.append(file)
                rows += count
            if not small or rows >= self.rows_per_file:
                if len(group) > 1:
                    yield group
                group, rows = [], 0
        if len(group) > 1:
            yield group

    def _table(self) -> pa.Table:
        """Return the buffered rows, on the CPU, with their values (Wang et al., arXiv 2406.11011, Theorem 3)."""
        steps = self._buffer
        counts = [len(step.domains) for step in steps]
        scores = [_on_cpu(step.dot_products) for step in steps]  # (n,), or (n, m, L or T) each
        dots = np.concatenate([total_of(each, self.granularity) for each in scores])
        lr = np.repeat([step.lr for step in steps], counts)
        clip, val_loss = (
            np.repeat(_numbers([each[None] for each in column]), counts)
            for column in ([step.clip_factor for step in steps], [step.val_loss for step in steps])
        )
        global_batch_size = np.repeat([step.global_batch_size for step in steps], counts)
        null = np.repeat(_numbers([step.null[None] for step in steps]) != 0, counts)
        row_weight = _numbers([step.row_weights for step in steps])
        unknown = null | (row_weight == 0)  # a row of weight zero has no gradient, and makes nothing fall
        in_pass = pa.array(np.where(row_weight == 0, 0.0, lr * clip * row_weight * dots), mask=null)
        exact = _exact_columns(steps, counts, self.by_target)
        columns = {
            "step": np.repeat([step.step for step in steps], counts),
            "sample_id": np.concatenate([step.sample_ids for step in steps]),
            "domain": pa.array([domain for step in steps for domain in step.domains]).dictionary_encode(),
            "block": np.concatenate([step.blocks for step in steps]),
            "rank": np.full(sum(counts), self.rank),
            "dot_product": pa.array(dots, mask=unknown),
            "train_loss": _numbers([step.train_losses for step in steps]),
            "val_loss": pa.array(val_loss, from_pandas=True),
            "lr": lr,
            "clip_factor": clip,
            "global_batch_size": global_batch_size,
            "row_weight": row_weight,
            "value": exact["exact_value"] if self.values == "exact" else in_pass,
            **exact,
        }
        if self.granularity != "total":
            columns[self.granularity] = _lists(scores, unknown)
        return pa.table(columns, schema=self._schema)


def _exact_columns(steps: Sequence[_Rows], counts: Sequence[int], by_target: bool) -> dict[str, pa.Array]:
    """Return the columns of exact values, null in steps without them. With parts a value is their sum in float64."""
    values, parts = [], []
    for step, count in zip(steps, counts, strict=True):
        if step.exact is None:
            values.append(np.full(count, math.nan))
            parts.append(np.empty((count, 0)))
        elif step.exact.by_target is None:
            values.append(_on_cpu(step.exact.values))
        else:
            parts.append(_on_cpu(step.exact.by_target))
            values.append(np.where(np.isnan(_on_cpu(step.exact.values)), math.nan, parts[-1].sum(1)))
    columns = {"exact_value": np.concatenate(values)}
    for name in OF_STEP:
        each = [math.nan if step.exact is None else getattr(step.exact, name) for step in steps]
        columns[name] = np.repeat(each, counts)
    lists = {TARGET_COLUMN: _lists(parts, np.isnan(columns["exact_value"]))} if by_target else {}
    return lists | {
        name: pa.array(column, from_pandas=True) for name, column in columns.items()
    }  # NaN is null


def drop_rows_from(
    folder: str | os.PathLike[str],
    step: int,
    *,
    metadata: Mapping[str, str],
    granularity: Granularity,
    values: ValueKind,
    by_target: bool = False,
) -> None:
    """Remove the rows of `step` and later of all processes that ever wrote here, none of which is at work: a
    run that resumes there computes them again. Raises as `ScoreWriter`."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    for rank in sorted({file.rank for file in list_files(folder)}):
        writer = ScoreWriter(
            folder, rank=rank, metadata=metadata, granularity=granularity, values=values, by_target=by_target
        )
        writer.drop_from(step)


def _copy(value: Tensor) -> Tensor:
    """Return a copy of a tensor, whose buffer the caller may reuse in the next step."""
    return value.detach().clone()


def _numbers(tensors: list[Tensor]) -> npt.NDArray[np.float64]:
    return _on_cpu(torch.cat(tensors))


def _on_cpu(tensor: Tensor) -> npt.NDArray[np.float64]:
    numbers: npt.NDArray[np.float64] = tensor.to("cpu", torch.float64).numpy()
    return numbers


def _lists(scores: Sequence[npt.NDArray[np.float64]], null: npt.NDArray[np.bool_]) -> pa.Array:
    """Return one list of numbers for each row, null where a row has no scores.

    Args:
        scores: of each append(), (n, c); c need not be the same, as where batches are padded to their longest row.
        null: (rows,)
    """
    lengths = np.where(null, 0, np.concatenate([np.full(len(each), each.shape[1]) for each in scores]))
    offsets = pa.array(np.append(0, lengths.cumsum()), pa.int32(), mask=np.append(null, False))
    cuts = np.cumsum([len(each) for each in scores])[:-1]
    kept = [each[~rows].ravel() for each, rows in zip(scores, np.split(null, cuts), strict=True)]
    return pa.ListArray.from_arrays(offsets, np.concatenate(kept))


def open_scores(folder: str | os.PathLike[str]) -> ds.Dataset:
    """Open the scores of a run for reading; `.schema.metadata` describes the run.

    Scores of version 4 and older have no column row_weight: all rows of a step count the same there.

    Raises:
        ScoreError: there are none, another version of this program wrote them, or they are of several runs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ScoreError(f"{folder} is not a folder of scores: give {{result_dir}}/grad_dotprods of a run")
    with file_errors(folder, ScoreError):
        files = list_files(folder)
    if not files:
        raise ScoreError(
            f"{folder} has no scores yet: they are written every few steps of a run that computes them"
        )
    origin = read_origin(files[0].path)
    version = origin.get("format_version")
    for path in (file.path for file in files):
        check_origin(path, {**origin, **FORMAT} | ({"format_version": version} if version in LACKING else {}))
    if "granularity" not in origin:
        raise ScoreError(f"{files[0].path} has no granularity in its metadata: this program did not write it")
    doubled = superseded(files)
    paths = [str(file.path) for file in files if file not in doubled]
    columns = [
        field
        for field in score_schema(origin["granularity"], BY_TARGET in origin)
        if field.nullable or field.name not in LACKING.get(str(version), ())
    ]
    return ds.dataset(paths, schema=pa.schema(columns, metadata=origin), format="parquet")
