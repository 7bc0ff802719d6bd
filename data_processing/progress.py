"""Show the progress of a tokenization: a bar in a terminal, lines in a log file."""

import logging
import time
from contextlib import ExitStack
from typing import Any, Self

from tqdm.contrib.logging import logging_redirect_tqdm

from data_processing.batch_encoder import Counts, EncodedBatch
from data_processing.pile_records import LineBatch
from foundation.progress import progress_bar

SHOWN_BAD_RECORDS = 10  # in the log; bad_records.txt lists all of them
LOG_SECONDS = 60  # between two lines in a log file
log = logging.getLogger(__name__)


class TokenizationProgress:
    """Show how much of the input files is read.

    The bar counts bytes on disk. The rate after it is of text, which is more if the files are compressed.
    Without a terminal there is no bar, but a log line every LOG_SECONDS.
    """

    def __init__(self, name: str, total_bytes: int) -> None:
        self._name, self._total_bytes = name, total_bytes
        self._counts = Counts()
        self._before = 0  # bytes of the finished files
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._bar = self._stack.enter_context(
            progress_bar(self._name, self._total_bytes, "B", at_once=True, terminal_only=True)
        )
        self._stack.enter_context(logging_redirect_tqdm())
        self._started = self._logged = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def show(self, batch: LineBatch, encoded: EncodedBatch) -> None:
        """Count one batch. Batches come in the order of the input."""
        for line, reason in encoded.bad_records[: max(0, SHOWN_BAD_RECORDS - self._counts.bad_records)]:
            log.warning("left out: %s:%d: %s", batch.source.path, line, reason)
        self._counts.add(encoded.counts)
        now = time.monotonic()
        rate = self._counts.text_bytes / 1e6 / (now - self._started)
        state = f"text {rate:.1f} MB/s, {self._counts.documents} documents"
        read = self._before + batch.bytes_read
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(read - self._bar.n)
        if self._bar.disable and now - self._logged > LOG_SECONDS:
            self._logged = now
            log.info("%s: read %.1f of %.1f MB, %s", self._name, read / 1e6, self._total_bytes / 1e6, state)
        if batch.is_last:
            self._before += batch.source.size
