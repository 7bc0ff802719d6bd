"""What is curated: shards, LLaVA records, or the samples of any loop. Each kind writes its own data folder."""

import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from attribution.curate.curated_dataset import write_dataset
from attribution.curate.curated_folder import find_other_splits, plan_cuts, write_splits
from attribution.curate.curated_records import write_records
from attribution.curate.drop_rule import Choice
from attribution.samples import BlockSamples, RecordSamples, Samples, StoredSamples
from attribution.scored_run import ScoredRun, samples_of
from attribution.units import Unit
from data_processing.shards import list_shards

# Of a data set of any loop's samples.
NOT_IN_IT = (
    "rows that training never used are not in it, nor columns of your data set that are no metadata of the samples. "
    "For the columns, take these ids from your data set: dataset.select(sorted(ids)) where ids are row indices. For "
    "the rows, too, leave out the ids of dropped.parquet instead (docs/values.md, “From your own loop”)"
)


class CuratedData(ABC):
    """The data of some runs, and what is left of them. source: the folder that they are in."""

    source: Path

    def __init__(self, run: ScoredRun, samples: Samples, data_dir: Path | None) -> None:
        self.run, self.samples = run, samples

    @abstractmethod
    def write(self, target: Path, unit: Unit, choice: Choice, dropped: Path) -> dict[str, Any]:
        """Write the data without what was dropped, and return its part of the manifest, with "domains".

        Args:
            target: a folder.
            dropped: the file that `choose` wrote.

        Raises:
            AttributionError: nothing is left.
        """

    @abstractmethod
    def to_train(self, output: Path) -> str:
        """Return what to call to train on the result."""


class CuratedShards(CuratedData):
    """Shards: those that lose tokens are cut, all other files linked."""

    samples: BlockSamples

    def __init__(self, run: ScoredRun, samples: BlockSamples, data_dir: Path | None) -> None:
        super().__init__(run, samples, data_dir)
        self.source = samples.documents.shards[0].path.parent.parent
        self.others = find_other_splits(self.source, run.split)

    def write(self, target: Path, unit: Unit, choice: Choice, dropped: Path) -> dict[str, Any]:
        split, block_size = self.run.split, self.run.block_size
        cuts = plan_cuts(self.samples.documents.shards, choice, unit, block_size)
        write_splits(target, self.others, cuts, dropped)
        tokens = {shard.domain: shard.num_tokens for shard in list_shards(target, split)}
        domains = {each.shard.domain: each.describe(tokens.get(each.shard.domain, 0)) for each in cuts}
        return {"split": split, "block_size": block_size, "domains": domains}

    def to_train(self, output: Path) -> str:
        return f"./Scripts/train.sh --pile_data_dir {shlex.quote(str(output))}"


class CuratedRecords(CuratedData):
    """LLaVA records: those of one split are left out, the rest and the images linked."""

    def __init__(self, run: ScoredRun, samples: RecordSamples, data_dir: Path | None) -> None:
        super().__init__(run, samples, data_dir)
        self.source = run.records_folder(data_dir)

    def write(self, target: Path, unit: Unit, choice: Choice, dropped: Path) -> dict[str, Any]:
        domains = write_records(target, self.source, self.run.split, choice, dropped)
        return {"split": self.run.split, "block_size": self.run.block_size, "domains": domains}

    def to_train(self, output: Path) -> str:
        return f"./Scripts/train.sh --llava_data_dir {shlex.quote(str(output))}"


class CuratedSamples(CuratedData):
    """The samples of any loop, written as a data set."""

    samples: StoredSamples

    def __init__(self, run: ScoredRun, samples: StoredSamples, data_dir: Path | None) -> None:
        super().__init__(run, samples, data_dir)
        self.source = samples.rows.folders[0]

    def write(self, target: Path, unit: Unit, choice: Choice, dropped: Path) -> dict[str, Any]:
        domains = write_dataset(target, self.samples, choice, dropped)
        return {"domains": domains, "not_in_it": NOT_IN_IT}

    def to_train(self, output: Path) -> str:
        files = str(Path(escape(str(output)), "data", "*.parquet"))  # a name may have letters of patterns
        return f'datasets.load_dataset("parquet", data_files={files!r}, split="train")'


def curated_data(runs: Sequence[ScoredRun], data_dir: Path | None) -> CuratedData:
    """Return the data of runs of the same data. Raises as `samples_of`."""
    samples = samples_of(runs, data_dir)
    if isinstance(samples, BlockSamples):
        return CuratedShards(runs[0], samples, data_dir)
    if isinstance(samples, RecordSamples):
        return CuratedRecords(runs[0], samples, data_dir)
    assert isinstance(samples, StoredSamples), samples
    return CuratedSamples(runs[0], samples, data_dir)
