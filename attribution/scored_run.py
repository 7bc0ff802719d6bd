"""Open a run that wrote scores: its settings, its score files, and where its samples are."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from attribution.errors import AttributionError
from attribution.samples import BlockSamples, RecordSamples, Samples, StoredSamples
from data_processing.blocks import BlockDataset
from data_processing.domain_lists import Selection
from data_processing.shards import Shard, list_shards
from foundation.errors import file_errors
from score_store.run_folder import RunFolder
from score_store.samples import IMAGES, KEPT, OWN, open_samples
from score_store.schema import BY_TARGET, LACKING, WordSplit
from score_store.writer import open_scores

OTHER_VERSION = "another version of this program wrote it; use that version"

METADATA = ("run_configuration", "validation_sha256", "granularity")  # keys that all scores' metadata have


@dataclass(frozen=True)
class ScoredRun:
    """A run with scores."""

    folder: Path
    config: dict[str, Any]  # its config.json
    metadata: dict[str, str]  # of the scores' schema, the same in every file
    files: tuple[Path, ...]  # the valid score files, sorted by step

    @classmethod
    def open(cls, result_dir: str | Path) -> Self:
        """Read settings and schemas, no scores.

        Raises:
            AttributionError: the folder is not a run's, or the run's method is Regular.
            ScoreError: there are no scores, or they are another version's or several runs'.
        """
        folder = Path(result_dir)
        with file_errors(folder, AttributionError):
            config = _read_config(folder)
            if config["method"] == "Regular":
                raise AttributionError(
                    f"{folder} is a run of method Regular, which has no scores; train with --method "
                    "GradDotProd"
                )
            scores = open_scores(RunFolder(folder).scores)
        metadata = {key.decode(): value.decode() for key, value in scores.schema.metadata.items()}
        kind = KINDS.get(metadata.get("samples"))
        if kind is None:
            raise AttributionError(f"{scores.files[0]} has samples {metadata['samples']!r}: {OTHER_VERSION}")
        needed = (*METADATA, *kind.identity, *(() if metadata["format_version"] == "2" else ("values",)))
        for path, has, keys in (
            (scores.files[0], metadata, needed),
            (folder / "config.json", config, kind.config),
        ):
            if missing := [key for key in keys if key not in has]:
                raise AttributionError(f"{path} lacks {', '.join(missing)}: {OTHER_VERSION}")
        return cls(folder, config, metadata, tuple(map(Path, scores.files)))

    @property
    def granularity(self) -> str:
        return self.metadata["granularity"]

    @property
    def by_word(self) -> WordSplit | None:
        """How the scores split each value by word; None: they do not."""
        if BY_TARGET in self.metadata:
            return "target"
        return "position" if self.granularity == "token" and not self.exact else None

    @property
    def sample_kind(self) -> "SampleKind":
        """What the run's samples are."""
        return KINDS[self.metadata.get("samples")]

    @property
    def data(self) -> dict[str, Any]:
        """Return of which data the run is: what the metadata say of it, decoded."""
        return {
            key: self.metadata[key] if key == "split" else json.loads(self.metadata[key])
            for key in self.sample_kind.identity
        }

    @property
    def lacks(self) -> tuple[str, ...]:
        """The columns that the scores lack because an older version wrote them."""
        return LACKING.get(self.metadata["format_version"], ())

    @property
    def older(self) -> bool:
        """Whether the version that wrote the scores knew values of another kind alone."""
        return self.metadata["format_version"] == "2"

    @property
    def exact(self) -> bool:
        """Whether values are the exact ones."""
        return not self.older and self.metadata["values"] == "exact"

    @property
    def kind(self) -> str:
        """What the run's values are, in words."""
        if self.exact:
            return "exact shares of the fall of the validation loss in each step, in nats"
        if self.direction == "auto":
            return "falls of the validation loss in each step as its backward pass predicts them, in nats"
        if self.direction == "adamw":
            return "of an older kind, which follow AdamW's scaling, but are far larger than the effect of its steps"
        return (
            "what steps along the plain gradient would do (--direction gradient)"
            if self.optimizer == "SGD"
            else "what steps along the plain gradient would do (--direction gradient), not those of AdamW: a ranking "
            "at best, and no amounts"
        )

    @property
    def optimizer(self) -> str:
        """The optimizer of the run, where its configuration names it."""
        return self._setting("optimizer")

    @property
    def direction(self) -> str:
        """The direction that the training gradients were multiplied with: "auto" or "gradient"; older: "adamw"."""
        return self._setting("direction")

    def _setting(self, name: str) -> str:
        """Return a setting of the run that its scores name. Raises AttributionError if they do not."""
        configuration: dict[str, str] = json.loads(self.metadata["run_configuration"])
        if name not in configuration:
            raise AttributionError(f"{self.folder}: the scores' configuration lacks {name}: {OTHER_VERSION}")
        return configuration[name]

    @property
    def block_size(self) -> int:
        """T, of the blocks of a run on shards."""
        return int(self.metadata["block_size"])

    @property
    def split(self) -> str:
        """The name of the folder with the training shards, of a run on shards or records."""
        return self.metadata["split"].partition(":")[0]

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """All domains of the split, of a run on shards or records. A domain's index here is in the high bits of its
        samples' ids."""
        return tuple(json.loads(self.metadata["domains"]))

    @cached_property
    def checksums(self) -> dict[str, str]:
        """The SHA-256 of the shard of each domain that the run trained on; of records, of each domain."""
        checksums: dict[str, str] = json.loads(self.metadata["shard_sha256"])
        return checksums

    def shards(self, pile_data_dir: Path | None = None) -> list[Shard]:
        """Return the shards of `domains`, in that order.

        Args:
            pile_data_dir: the folder of the splits; None: the one that the run used.

        Raises:
            AttributionError: a shard is missing, or differs from the one that the run trained on.
            ShardError: a shard is damaged, or there are none.
        """
        folder = Path(self.config["pile_data_dir"]) if pile_data_dir is None else Path(pile_data_dir)
        there = {shard.domain: shard for shard in list_shards(folder, self.split)}
        for domain in self.domains:
            if domain not in there:
                raise AttributionError(
                    f"{folder / self.split} has no shard of {domain!r}, which {self.folder} was trained "
                    "with; put it back, or name the folder that has it with --pile_data_dir"
                )
            checksum = there[domain].checksum
            if self.checksums.get(domain, checksum) != checksum:
                raise AttributionError(
                    f"{there[domain].path} is not the shard that {self.folder} was trained on: its sha256 is "
                    f"{checksum}, the scores name {self.checksums[domain]}; name the folder that has "
                    "it with --pile_data_dir"
                )
        return [there[domain] for domain in self.domains]

    def blocks(self, pile_data_dir: Path | None = None) -> BlockDataset:
        """Return the training samples, with the ids of the scores. Raises as `shards`."""
        used = Selection("--train_set", self.metadata["split"], self.split, tuple(self.checksums))
        return BlockDataset(self.shards(pile_data_dir), self.block_size, used)

    def scores(self) -> ds.Dataset:
        """Return the scores, to be read in pieces. Raises as `open`."""
        return open_scores(RunFolder(self.folder).scores)

    def samples(self, data_dir: Path | None = None) -> Samples:
        """Return what the tools show of the training samples. Args and errors as of `samples_of`."""
        return samples_of([self], data_dir)

    def records_folder(self, data_dir: Path | None = None) -> Path:
        """Return the folder of the records and images that a run with samples of its own was trained on."""
        return Path(self.config["llava_data_dir"]) if data_dir is None else data_dir

    def validation_rows(self) -> pa.Table:
        """Return the m validation rows of the scores: sample_id, domain, block, tokens (T+1 each), text.

        Raises:
            AttributionError: the file is missing or damaged.
        """
        path = RunFolder(self.folder).validation_rows
        with file_errors(path, AttributionError):
            if not path.is_file():
                raise AttributionError(f"{path} is missing: copy the run's folder again")
            try:
                return pq.read_table(path)
            except pa.ArrowInvalid as error:
                raise AttributionError(f"{path} is damaged ({error}): copy the run's folder again") from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, in order, without an unfinished last line.

        A loop of one's own need not write them: then there are none.

        Raises:
            AttributionError: the file is missing or damaged.
        """
        path = RunFolder(self.folder).metrics
        if not (self.sample_kind.needs_metrics or path.exists()):
            return []
        with file_errors(path, AttributionError):
            if not path.is_file():
                raise AttributionError(f"{path} is missing: copy the run's folder again")
            lines = path.read_bytes().splitlines(keepends=True)
        try:
            return [json.loads(line) for line in lines if line.endswith(b"\n")]
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise AttributionError(f"{path} has a line that is not JSON ({error}); copy it again") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = RunFolder(folder).config
    if not path.is_file():
        raise AttributionError(
            f"{folder} is not the folder of a run: it has no config.json; name a result_dir"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AttributionError(f"{path} is not JSON ({error}): name the folder of a run") from error
    if not isinstance(config, dict) or not {"method", "run_name"} <= config.keys():
        raise AttributionError(f"{path} is not of a run (a saved model has one, too); name a result_dir")
    return config


def read_run(folder: str | Path) -> ScoredRun:
    """Open the folder of a run: of main.py, or what `score_store.write_run` wrote. Raises as `ScoredRun.open`."""
    return ScoredRun.open(folder)


def samples_of(runs: Sequence[ScoredRun], data_dir: Path | None = None) -> Samples:
    """Return what the tools show of the training samples of runs of the same data.

    Args:
        data_dir: the folder of the splits or of the records, or the one that has the folder of images; None: the one
            that the first run used.

    Raises:
        ScoreError: the runs' own samples are missing, damaged, or contradict each other.
        AttributionError, ShardError: as `ScoredRun.shards`.
    """
    return runs[0].sample_kind.open(runs, data_dir)


@dataclass(frozen=True)
class SampleKind:
    """What a run says of its samples, by their kind ("samples" in the scores' metadata).

    open: returns the samples of runs of the same data, as `samples_of`.
    identity: keys of the metadata that say of which data the run is.
    config: keys of config.json that it must have.
    needs_metrics: whether every such run has metrics.jsonl.
    """

    open: Callable[[Sequence[ScoredRun], Path | None], Samples]
    identity: tuple[str, ...]
    config: tuple[str, ...]
    needs_metrics: bool = True


def _open_blocks(runs: Sequence[ScoredRun], data_dir: Path | None) -> Samples:
    return BlockSamples(runs[0].blocks(data_dir), runs[0].shards(data_dir))


def _open_records(runs: Sequence[ScoredRun], data_dir: Path | None) -> Samples:
    run = runs[0]
    rows = open_samples(RunFolder(run.folder).samples)
    return RecordSamples(rows, run.domains, run.checksums, run.records_folder(data_dir) / IMAGES)


def _open_own(runs: Sequence[ScoredRun], data_dir: Path | None) -> Samples:
    rows = open_samples(
        *(RunFolder(run.folder).samples for run in runs)
    )  # a run may lack those that another used
    images = runs[0].config["images"]
    if images is not None and data_dir is not None:
        images = data_dir / Path(images).name
    return StoredSamples(rows, None if images is None else Path(images))


OF_SHARDS = ("block_size", "split", "domains", "shard_sha256")
KINDS = {
    None: SampleKind(_open_blocks, OF_SHARDS, ("pile_data_dir",)),
    KEPT: SampleKind(_open_records, OF_SHARDS, ("pile_data_dir", "llava_data_dir")),
    OWN: SampleKind(_open_own, (), ("images",), needs_metrics=False),
}


def same_samples(runs: Sequence[ScoredRun]) -> None:
    """Check that sample ids and values mean the same in all runs, and that no run is named twice.

    Raises:
        AttributionError: they do not.
    """
    assert runs, "no run"
    for number, run in enumerate(runs[1:], 1):
        if run.folder.resolve() in [other.folder.resolve() for other in runs[:number]]:
            raise AttributionError(f"{run.folder} is named twice; name each run once")
        for key in ("samples", *runs[0].sample_kind.identity):
            own, first = run.metadata.get(key), runs[0].metadata.get(key)
            if own != first:
                raise AttributionError(
                    f"{run.folder} and {runs[0].folder} are runs of different data: their {key} is "
                    f"{own!s:.200} and {first!s:.200}; give runs of the same data"
                )
        if run.kind != runs[0].kind:
            raise AttributionError(
                f"{run.folder} and {runs[0].folder} have values of different kinds, without a common scale: "
                f"{run.kind}; and {runs[0].kind}; give runs of one kind"
            )
