"""The scores of a run on disk, and what is written beside them.

`write_run` is for any training loop; `attribution.read_run` reads what it wrote.
"""

from score_store.pieces import pieces_of
from score_store.run_writer import Processes, RunWriter, write_run
from score_store.samples import Sample, SampleWriter
from score_store.schema import ScoreError
from score_store.writer import ExactRows

__all__ = [
    "ExactRows",
    "Processes",
    "RunWriter",
    "Sample",
    "SampleWriter",
    "ScoreError",
    "pieces_of",
    "write_run",
]
