"""The folder of a scored Trainer's scores and samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from score_store.run_writer import RunWriter
from score_store.samples import Sample
from score_store.writer import ScoredStep


class RunOfTrainer:
    """What a manager writes to: the scores of a run, each of whose samples is written before its scores are."""

    def __init__(self, rows: int) -> None:
        """Prepare; `open` comes before anything is written. rows: of the dataset."""
        self._opened: RunWriter | None = None
        self._seen = np.zeros(rows, dtype=bool)

    def open(self, writer: RunWriter) -> None:
        """Write to this run from now on."""
        self._opened = writer

    @property
    def _writer(self) -> RunWriter:
        assert self._opened is not None, "not open"
        return self._opened

    def unseen(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return which of a batch's samples, by their place in it, have no text in the run yet, each once."""
        _, first = np.unique(rows, return_index=True)
        places = first[~self._seen[rows[first]]]
        self._seen[rows] = True
        return places

    def keep(self, samples: Sequence[Sample]) -> None:
        """Write samples of the run."""
        self._writer.samples.append(samples)

    def append(self, of_step: ScoredStep, **of_rows: Any) -> None:
        """Buffer the scores of a micro-batch."""
        self._writer.scores.append(of_step, **of_rows)

    def flush(self) -> None:
        self._writer.flush()

    def merge(self) -> None:
        self._writer.flush()
        self._writer.scores.merge()

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
