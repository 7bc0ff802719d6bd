"""Measure the score rows per second that `attribution.values` sums, and its use of memory and disk.

    python -m benchmarks.value_rate --rows 100000000

Make the folder of a run, with score files of the size that the writer merges them to and samples in a seeded
order. Make matching shards, whose tokens are holes in the files: values need only the positions of documents.
Then run write_values in a fresh process. Memory use grows with --samples, the number of distinct samples. All
files are in a temporary folder (TMPDIR), about 130 bytes per row, and are removed.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import trange

from data_processing.block_order import permute
from data_processing.blocks import BLOCK_BITS
from data_processing.shards import (
    FORMAT_VERSION,
    GPT2_BYTES_IDS,
    INDEX_TYPE,
    MAGIC,
    write_json_atomically,
)
from score_store.files import score_file
from score_store.schema import DICTIONARY_COLUMNS, FORMAT, OF_STEP, score_schema

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = 22  # as many as the Pile has, each 0.8 times as large as the one before
BLOCK_SIZE = 1024
DOCUMENT_TOKENS = 1000  # mean
POLL_SECONDS = 0.5
Integers = npt.NDArray[np.int64]

CHILD = """
import json, resource, sys, time
from pathlib import Path
from attribution.scored_run import ScoredRun
from attribution.values import write_values
folder, normalise, memory_limit = sys.argv[1:]
start = time.perf_counter()
values = write_values(
    [ScoredRun.open(folder)], Path(folder, "values"), normalise=normalise, memory_limit=memory_limit
)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, **values.manifest["rows"]}))
"""


def count_blocks(samples: int) -> Integers:
    """Return the number of blocks of each domain, (DOMAINS,), at least `samples` in all."""
    weights = 0.8 ** np.arange(DOMAINS)
    return np.ceil(samples * weights / weights.sum()).astype(np.int64)


def write_shards(folder: Path, blocks: Integers, random: np.random.Generator) -> dict[str, str]:
    """Write shards whose .bin takes no space. Return their made-up checksums by domain."""
    folder.mkdir(parents=True)
    checksums = {}
    for number, count in enumerate(blocks.tolist()):
        domain, num_tokens = f"Domain {number:02d}", count * BLOCK_SIZE + 1
        lengths = (
            random.lognormal(0, 1, 2 * num_tokens // DOCUMENT_TOKENS + 8) * DOCUMENT_TOKENS / math.exp(0.5)
        )
        starts = np.concatenate(([0], (lengths.astype(np.int64) + 2).cumsum()))
        starts = starts[starts < num_tokens - 1].astype(INDEX_TYPE)
        starts.tofile(folder / f"{domain}.idx")
        with (folder / f"{domain}.bin").open("wb") as file:
            file.truncate(num_tokens * GPT2_BYTES_IDS.token_type.itemsize)
            file.seek(-GPT2_BYTES_IDS.token_type.itemsize, os.SEEK_END)
            file.write(GPT2_BYTES_IDS.token_type.type(GPT2_BYTES_IDS.end_of_text).tobytes())
        checksums[domain] = f"made up for {domain}"
        fields = {
            "magic": MAGIC, "format_version": FORMAT_VERSION, "split": "train", "domain": domain,
            **asdict(GPT2_BYTES_IDS), "token_type": "uint16", "num_tokens": num_tokens, "num_documents": len(starts),
            "max_token_id": GPT2_BYTES_IDS.end_of_text, "checksum": checksums[domain], "index_checksum": "made up",
        }  # fmt: skip
        write_json_atomically(folder / f"{domain}.json", fields)
    return checksums


def write_scores(
    folder: Path,
    args: argparse.Namespace,
    blocks: Integers,
    metadata: dict[str, str],
    random: np.random.Generator,
) -> None:
    """Write scores of steps of `batch_size` rows. Each epoch has every sample once, in a seeded order."""
    folder.mkdir(parents=True)
    schema = score_schema().with_metadata({**metadata, "granularity": "total", "values": "in_pass", **FORMAT})
    steps = args.rows // args.batch_size
    steps_per_file = args.rows_per_file // args.batch_size
    keys = random.integers(0, 2**64, 8, np.uint64)
    for first in trange(0, steps, steps_per_file, desc="making scores", unit="file"):
        step = np.arange(first, min(first + steps_per_file, steps))
        places = np.arange(step[0] * args.batch_size, (step[-1] + 1) * args.batch_size) % args.samples
        table = make_score_table(step, permute(places, args.samples, keys), args.batch_size, blocks, random)
        path = score_file(folder, int(step[0]), int(step[-1]), 0).path
        pq.write_table(table.cast(schema), path, compression="zstd", use_dictionary=DICTIONARY_COLUMNS)


def make_score_table(
    steps: Integers, samples: Integers, batch_size: int, blocks: Integers, random: np.random.Generator
) -> pa.Table:
    """Return rows like those of training: float32 dot products; one lr, clip_factor and val_loss per step."""
    ends = blocks.cumsum()
    domain = np.searchsorted(ends, samples, "right")
    block = samples - (ends - blocks)[domain]
    lr = np.repeat(6e-4 / (1 + steps / 1e4), batch_size)
    clip, val_loss = (np.repeat(random.random(len(steps), np.float32), batch_size) for _ in range(2))
    dots = random.standard_normal(len(samples), np.float32).astype(np.float64) + 0.1
    names = pa.array([f"Domain {number:02d}" for number in range(len(blocks))])
    columns = {
        "step": np.repeat(steps, batch_size),
        "sample_id": domain << BLOCK_BITS | block,
        "domain": pa.DictionaryArray.from_arrays(domain.astype(np.int32), names),
        "block": block,
        "rank": np.zeros(len(samples), np.int32),
        "dot_product": dots,
        "train_loss": random.random(len(samples), np.float32),
        "val_loss": val_loss,
        "lr": lr,
        "clip_factor": clip,
        "global_batch_size": np.full(len(samples), batch_size, np.int32),
        "row_weight": np.full(len(samples), 1 / batch_size),
        "value": lr * clip * dots / batch_size,
        **dict.fromkeys(["exact_value", *OF_STEP], pa.nulls(len(samples), pa.float64())),
    }
    return pa.table(columns)


def make_run(folder: Path, args: argparse.Namespace) -> None:
    """Write the folder of a run, with scores and shards."""
    random = np.random.default_rng(0)
    blocks = count_blocks(args.samples)
    checksums = write_shards(folder / "shards" / "train", blocks, random)
    metadata = {
        "run_configuration": json.dumps({"direction": "auto", "optimizer": "AdamW"}),
        "validation_sha256": "made up", "block_size": str(BLOCK_SIZE),
        "split": "train", "layers": "[]", "shard_sha256": json.dumps(checksums),
        "domains": json.dumps(list(checksums)),
    }  # fmt: skip
    write_scores(folder / "grad_dotprods", args, blocks, metadata, random)
    config = {"method": "GradDotProd", "run_name": "made up", "resolved_from": {}}
    write_json_atomically(folder / "config.json", config | {"pile_data_dir": str(folder / "shards")})


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Run write_values, and print its time, memory and disk use."""
    free = lowest = shutil.disk_usage(folder).free
    command = [sys.executable, "-c", CHILD, str(folder), args.normalise, args.memory_limit]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            lowest = min(lowest, shutil.disk_usage(folder).free)
        assert child.stdout is not None
        output = child.stdout.read()
    if child.returncode != 0:
        raise SystemExit(f"write_values ended with status {child.returncode}")
    result = json.loads(output)
    rows = sum(pq.read_metadata(path).num_rows for path in (folder / "grad_dotprods").iterdir())
    counts = ", ".join(f"{result[name]:,} {name}" for name in ("samples", "documents", "steps"))
    print(
        f"{rows:,} rows, {counts}, normalise {args.normalise}, memory limit {args.memory_limit}:\n"
        f"{result['seconds']:.1f} s, {rows / result['seconds']:,.0f} rows/s, peak memory "
        f"{result['peak'] / 1e9:.2f} GB, disk {(free - lowest) / 1e9:.1f} GB at most"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks.value_rate", allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--samples", type=int, help="distinct ones [as many as rows]")
    parser.add_argument("--batch_size", type=int, default=512, help="rows of a step")
    parser.add_argument("--rows_per_file", type=int, default=1_000_000)
    parser.add_argument("--normalise", choices=("none", "absolute", "predicted"), nargs="+", default=["none"])
    parser.add_argument("--memory_limit", default="4GB")
    args = parser.parse_args(argv)
    args.samples = args.samples or args.rows
    with tempfile.TemporaryDirectory(prefix="value_rate-") as folder:
        make_run(Path(folder), args)
        for normalise in args.normalise:
            measure(Path(folder), argparse.Namespace(**{**vars(args), "normalise": normalise}))


if __name__ == "__main__":
    main(sys.argv[1:])
