"""Compare tokenize_pile with the library's own batch encoder, on the same text with as many threads.

    python -m benchmarks.tokenize_speed --input train.jsonl --num_workers 2 --rounds 5 [--tokenizer FOLDER]

The library is tiktoken (encode_ordinary_batch), or of a tokenizer.json tokenizers (encode_batch_fast). It gets the
texts in memory, and its ids are discarded. tokenize_pile starts its processes, reads and checks the files, encodes,
writes the shards of each file, joins them and waits for the disk. A short input is repeated up to --megabytes: the
start of 0.3 s, negligible for the Pile, would count too much. Rounds of both alternate, because other work on the
machine slows both down. Each ratio is of two consecutive rounds; the result is the median ratio.
"""

import argparse
import logging
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from data_processing.input_files import find_inputs
from data_processing.tokenize_pile import tokenize
from data_processing.tokenizer_files import FILE, read_library
from data_processing.train_tokenizer import texts_of
from foundation.paths import path_argument


def repeat_inputs(inputs: Sequence[Path], megabytes: float, folder: Path) -> list[Path]:
    """Return the input files and copies of them in `folder`, at least this many megabytes on disk."""
    sources = find_inputs(inputs)
    times = math.ceil(megabytes * 1e6 / sum(source.size for source in sources))
    paths = [source.path for source in sources]
    for copy in range(1, times):
        paths += [Path(shutil.copy(source.path, folder / f"{copy}-{source.path.name}")) for source in sources]
    return paths


def time_library(texts: list[str], tokenizer: str, num_threads: int) -> float:
    if tokenizer == "gpt2":
        encoding = tiktoken.get_encoding("gpt2")
        start = time.perf_counter()
        encoding.encode_ordinary_batch(texts, num_threads=num_threads)
        return time.perf_counter() - start
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # which tokenize_pile turns off for its processes
    library = read_library(Path(tokenizer) / FILE)
    start = time.perf_counter()
    library.encode_batch_fast(texts, add_special_tokens=False)
    return time.perf_counter() - start


def time_tokenize_pile(inputs: Sequence[Path], tokenizer: str, num_workers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        tokenize(inputs, split="train", output_dir=Path(folder), tokenizer=tokenizer, num_workers=num_workers)
        return time.perf_counter() - start


def compare(inputs: Sequence[Path], tokenizer: str, num_workers: int, rounds: int) -> None:
    texts = list(texts_of(find_inputs(inputs)))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{megabytes:.1f} MB of text, {len(texts)} documents, {num_workers} threads or processes")
    ratios = []
    for number in range(rounds):
        reference = time_library(texts, tokenizer, num_workers)
        ours = time_tokenize_pile(inputs, tokenizer, num_workers)
        ratios.append(reference / ours)
        print(
            f"round {number + 1}: library {megabytes / reference:5.1f} MB/s, "
            f"tokenize_pile {megabytes / ours:5.1f} MB/s, ratio {ratios[-1]:.2f}"
        )
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokenize_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input", nargs="+", type=path_argument, required=True, help="Pile records, as for tokenize_pile"
    )
    parser.add_argument(
        "--num_workers", type=int, required=True, help="processes here, threads of the library"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of both (default %(default)s)")
    parser.add_argument("--megabytes", type=float, default=50, help="at least, on disk (default %(default)s)")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, or a folder with a tokenizer.json")
    arguments = parser.parse_args(argv)
    os.environ["RAYON_NUM_THREADS"] = str(arguments.num_workers)  # threads of tokenizers
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        inputs = repeat_inputs(arguments.input, arguments.megabytes, Path(folder))
        compare(inputs, arguments.tokenizer, arguments.num_workers, arguments.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
