r"""Turn Pile records into the token shards of one split.

    python -m data_processing.tokenize_pile --input train/ --split train --output_dir data/pile \
        --tokenizer gpt2

Each `--input` is a file whose name ends in .jsonl or .ndjson, or one of these and .zst, .zstd or .gz, or a
folder of such files. Below a folder, names that begin with a dot are skipped, links are followed, a file with
several names is read once, and the log says what was left out. Documents keep the order of the inputs,
whatever the number of workers. Memory does not depend on the size of the input, except that zstd needs the
window of the file: up to 2 GiB after zstd --long=31. After an interruption run the same command again: it
skips the input files that were finished. Blank lines are ignored; a record whose text is "" is left out and
counted; every other line that is not a Pile record is an error, unless --on_bad_record skip.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_processing.batch_encoder import BatchEncoder, Counts, EncodedBatch
from data_processing.input_files import ENDINGS, InputFile, PileError, find_inputs
from data_processing.pile_records import LineBatch, read_line_batches
from data_processing.progress import TokenizationProgress
from data_processing.shards import FORMAT_VERSION, OF_VERSION_1, TokenIds, list_shards
from data_processing.split_parts import (
    BAD_RECORDS,
    MANIFEST,
    Part,
    PartKey,
    PartWriter,
    find_finished_part,
    join_parts,
    publish_split,
    work_folder,
)
from data_processing.tokenizer_files import FileTokenizer, find_tokenizer
from data_processing.tokenizers import TOKENIZERS, Tokenizer
from data_processing.worker_pool import WorkerPool
from foundation.arguments import ArgumentParser
from foundation.errors import UserError, file_errors
from foundation.paths import path_argument

SPLITS = ("train", "val", "test")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One split to make from input files."""

    sources: list[InputFile]
    split: str
    output_dir: Path
    ids: TokenIds
    open_tokenizer: Callable[[], Tokenizer]
    num_workers: int
    skip_bad_records: bool

    @property
    def target(self) -> Path:
        return self.output_dir / self.split

    def identity(self) -> dict[str, Any]:
        """Return the input and settings. A finished split with the same ones makes this job unnecessary."""
        names = {"split": self.split, **asdict(self.ids)}
        return names | {"inputs": [source.as_json() for source in self.sources]}


def tokenize(
    inputs: Sequence[Path],
    *,
    split: str,
    output_dir: Path,
    tokenizer: str,
    num_workers: int,
    on_bad_record: str = "error",
    end_of_text: str | None = None,
    begin_of_text: str | None = None,
) -> Counts:
    """Make {output_dir}/{split}, unless it is finished, and return the counts of its records.

    Args:
        tokenizer: one of TOKENIZERS, or the path of a tokenizer.json or of its folder.
        end_of_text, begin_of_text: tokens, as of `FileTokenizer.load`.

    Raises:
        PileError: the input is bad, or the output exists and was made with other input or settings.
        TokenizerError, ShardError, WorkerError
    """
    if split not in SPLITS:
        raise PileError(f"--split {split}: choose one of {', '.join(SPLITS)}")
    if num_workers < 1:
        raise PileError(f"--num_workers {num_workers}: at least 1")
    if on_bad_record not in ("error", "skip"):
        raise PileError(f"--on_bad_record {on_bad_record}: error or skip")
    ids, opener = find_tokenizer(tokenizer, end_of_text=end_of_text, begin_of_text=begin_of_text)
    job = Job(
        sources=find_inputs(inputs),
        split=split,
        output_dir=output_dir,
        ids=ids,
        open_tokenizer=opener,
        num_workers=num_workers,
        skip_bad_records=on_bad_record == "skip",
    )
    _check_other_splits(job)
    with work_folder(output_dir, split) as work:
        if job.target.exists() and any(job.target.iterdir()):
            counts = _finished_before(job)
            shutil.rmtree(work)  # an earlier process was interrupted after publishing
            return counts
        parts = _make_parts(job, work)
        joined = join_parts(work, parts, split=split, ids=job.ids)
        counts = Counts()
        for part in parts:
            counts.add(part.counts)
        if ids.tokenizer not in TOKENIZERS:
            opened = opener()
            assert isinstance(opened, FileTokenizer)
            opened.save(output_dir)
        manifest = {"format_version": FORMAT_VERSION} | job.identity()
        publish_split(joined, work, job.target, manifest | {"counts": asdict(counts)})
    _log_result(job, counts)
    return counts


def _check_other_splits(job: Job) -> None:
    """Check that the other splits of the folder have the same tokenizer: one model reads all of them."""
    for split in SPLITS:
        manifest = job.output_dir / split / MANIFEST
        if split == job.split or not manifest.is_file():
            continue
        found, wanted = OF_VERSION_1 | json.loads(manifest.read_bytes()), asdict(job.ids)
        different = next((name for name in wanted if found[name] != wanted[name]), None)
        if different is not None:
            detail = "" if different == "tokenizer" else f"{different} "
            raise PileError(
                f"--tokenizer {wanted['tokenizer']}: split {split!r} in {job.output_dir} has {detail}"
                f"{found[different]}{f' and not {wanted[different]}' * bool(detail)}; take the same, or another "
                "--output_dir"
            )


def _finished_before(job: Job) -> Counts:
    """Return the counts of the finished split.

    Raises:
        PileError: it was made from other input or with other settings.
    """
    remedy = f"remove {job.target}, or choose another --output_dir"
    manifest = job.target / MANIFEST
    if not manifest.is_file():
        raise PileError(f"{job.target}: is there, but was not made by this command (no {MANIFEST}); {remedy}")
    found = OF_VERSION_1 | json.loads(manifest.read_bytes())
    counts = Counts(**found.pop("counts"))
    wanted = job.identity()
    different = [name for name in wanted if found[name] != wanted[name]]
    if "inputs" in different:
        inputs = ", ".join(source["path"] for source in found["inputs"])
        raise PileError(
            f"{job.target}: is there, made of other inputs, or of these before they changed: {inputs}; "
            f"{remedy}"
        )
    if different:
        name = different[0]
        raise PileError(
            f"{job.target}: is there, with {name} {found[name]!r} and not {wanted[name]!r}; {remedy}"
        )
    if counts.bad_records and not job.skip_bad_records:
        raise PileError(
            f"{job.target}: was made without {counts.bad_records} bad records, listed in its {BAD_RECORDS}; "
            f"say --on_bad_record skip if that is right, or correct the input and {remedy}"
        )
    list_shards(job.output_dir, job.split)
    log.info("%s: all done before, from the same inputs: nothing to do", job.target)
    return counts


def _make_parts(job: Job, work: Path) -> list[Part]:
    """Return the parts of all input files, in order. Missing ones are made."""
    keys = [PartKey(source, job.split, job.ids) for source in job.sources]
    missing = [key for key in keys if not _is_usable(find_finished_part(work, key), job)]
    if len(missing) < len(keys):
        log.info("%d of %d input files were finished before", len(keys) - len(missing), len(keys))
    if missing:
        _encode(job, work, missing)
    parts = [part for key in keys if (part := find_finished_part(work, key)) is not None]
    assert len(parts) == len(keys), "a part was not finished"
    return parts


def _is_usable(part: Part | None, job: Job) -> bool:
    return part is not None and (job.skip_bad_records or part.counts.bad_records == 0)


def _encode(job: Job, work: Path, keys: Sequence[PartKey]) -> None:
    """Write one part per key. Workers encode the batches; results come back in order."""
    encoder = BatchEncoder(job.open_tokenizer())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of the workers: they are the parallelism
    batches = (batch for key in keys for batch in read_line_batches(key.source))
    total_bytes = sum(key.source.size for key in keys)
    with (
        WorkerPool(job.num_workers, encoder) as pool,
        TokenizationProgress(job.split, total_bytes) as progress,
    ):
        answers = pool.answers(batches)
        for key in keys:
            with PartWriter(work, key) as part:
                for batch, encoded in answers:
                    _check_records(job, batch, encoded)
                    part.add(encoded)
                    progress.show(batch, encoded)
                    if batch.is_last:
                        break


def _check_records(job: Job, batch: LineBatch, encoded: EncodedBatch) -> None:
    if encoded.bad_records and not job.skip_bad_records:
        line, reason = encoded.bad_records[0]
        raise PileError(
            f"{batch.source.path}:{line}: {reason}. "
            "Correct the line, or leave out bad records with --on_bad_record skip"
        )


def _log_result(job: Job, counts: Counts) -> None:
    for shard in list_shards(job.output_dir, job.split):
        log.info("%-24s %12d tokens %9d documents", shard.domain, shard.num_tokens, shard.num_documents)
    log.info(
        "%s: %d tokens of %s, %d documents, %.1f MB of text",
        job.target,
        counts.tokens,
        job.ids.tokenizer,
        counts.documents,
        counts.text_bytes / 1e6,
    )
    if counts.empty_texts:
        log.info("left out: %d records with an empty text", counts.empty_texts)
    if counts.bad_records:
        log.warning("left out: %d bad records, listed in %s", counts.bad_records, job.target / BAD_RECORDS)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = ArgumentParser(
        prog="python -m data_processing.tokenize_pile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        type=path_argument,
        required=True,
        metavar="PATH",
        help=f"files whose names end in {ENDINGS}; or folders of them",
    )
    parser.add_argument("--split", choices=SPLITS, required=True, help="the split the shards are for")
    parser.add_argument(
        "--output_dir", type=path_argument, required=True, help="the shards go to OUTPUT_DIR/SPLIT"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="NAME_OR_PATH",
        help="gpt2: byte-pair encoding, needs tiktoken's vocabulary file; gpt2_bytes: one token a byte; else a "
        "tokenizer.json in Hugging Face's format, or a folder with one",
    )
    parser.add_argument(
        "--end_of_text",
        metavar="TOKEN",
        help="of a tokenizer.json: the token after each document (default: the eos_token that its folder names)",
    )
    parser.add_argument(
        "--begin_of_text",
        metavar="TOKEN",
        help="of a tokenizer.json: the token before each document (default: the one that it puts before a text by "
        "itself, if any)",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=cores,
        help="processes that encode (default: one a core, %(default)s here)",
    )
    parser.add_argument(
        "--on_bad_record",
        choices=("error", "skip"),
        default="error",
        help="stop at a line that is not a Pile record (default), or leave it out, count it and list it",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments(argv)
    try:
        # Reading the input raises PileErrors, so an OSError here comes from writing the output.
        with file_errors(f"--output_dir {arguments.output_dir}", PileError):
            tokenize(**vars(arguments))
    except UserError as error:
        log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted; the same command resumes after the input files that were finished")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
