"""The paths in a run's folder, for those who write them and those who read them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """{results_dir}/{run_name}"""

    root: Path

    @property
    def config(self) -> Path:
        """Every setting as resolved; its presence marks the folder as a run."""
        return self.root / "config.json"

    @property
    def scores(self) -> Path:
        """A Parquet dataset: one row for each training sample and step."""
        return self.root / "grad_dotprods"

    @property
    def validation_rows(self) -> Path:
        """The validation rows that all scores refer to."""
        return self.root / "validation" / "rows.parquet"

    @property
    def samples(self) -> Path:
        """The texts of training samples that are not blocks of shards."""
        return self.root / "samples"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: what was measured in a step or an evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A folder for each checkpoint, step_NNNNNN."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """A symbolic link to the newest checkpoint."""
        return self.root / "model"

    @property
    def values(self) -> Path:
        """What attribution.values writes, unless it is told another folder."""
        return self.root / "values"

    @property
    def wandb_id(self) -> Path:
        """The run's id at Weights & Biases."""
        return self.root / "wandb_id"

    @property
    def lock(self) -> Path:
        """Held by the process that works in the folder."""
        return self.root / ".lock"
