"""Make shards of the sample data, run main.py and compute rank statistics, for all experiments.

PILE_SAMPLE_DIR must name a folder with pile/{train,val,test}.jsonl in the Pile's format. tiktoken's GPT-2
vocabulary is needed, from TIKTOKEN_CACHE_DIR or the network.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from attribution.curate.curated_folder import SUFFIXES
from attribution.curate.cut_shards import cut_shard
from attribution.database import Normalise
from attribution.scored_run import ScoredRun
from attribution.values import write_values
from benchmarks.launch import ROOT, flags_of
from data_processing.shards import GPT2_IDS, Shard, ShardWriter, Tokens, list_shards
from foundation.paths import expand_home, path_argument
from foundation.progress import progress_bar

SPLITS = ("train", "val", "test")
Result = TypeVar("Result")


def experiment_parser(name: str, about: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all experiments share."""
    parser = argparse.ArgumentParser(name, description=about, allow_abbrev=False)
    parser.add_argument(
        "--work_dir", type=path_argument, required=True, help="shards and runs; existing ones are reused"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=400)
    return parser


def run_python(*arguments: object) -> None:
    """Run a command in a process with one thread. If it fails, end the program with its output."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, arguments))} failed:\n{done.stdout}{done.stderr}")


def make_sample_shards(folder: Path) -> Path:
    """Tokenize the three splits of the sample data with gpt2, unless that is done. Return the folder."""
    if "PILE_SAMPLE_DIR" not in os.environ:
        raise SystemExit("set PILE_SAMPLE_DIR to a folder with pile/train.jsonl, val.jsonl and test.jsonl")
    sample = Path(expand_home(os.environ["PILE_SAMPLE_DIR"], "PILE_SAMPLE_DIR")) / "pile"
    for split in SPLITS:
        if not (folder / split).exists():
            run_python(
                "-m", "data_processing.tokenize_pile", "--input", sample / f"{split}.jsonl", "--split", split,
                "--output_dir", folder, "--tokenizer", "gpt2",
            )  # fmt: skip
    return folder


def write_split(folder: Path, split: str, tokens: dict[str, Tokens]) -> None:
    """Write the shards of one split. tokens: domain -> whole documents with their END_OF_TEXT."""
    (folder / split).mkdir(parents=True)
    for domain, each in tokens.items():
        with ShardWriter(folder / split, domain, split=split, ids=GPT2_IDS) as shard:
            shard.extend(np.asarray(each, dtype="<u2"))


def cut_head(shard: Shard, tokens: int) -> Tokens:
    """Return at most the first `tokens` tokens of a shard. The last one becomes an END_OF_TEXT."""
    head = np.array(shard.tokens[:tokens])
    head[-1] = GPT2_IDS.end_of_text
    return head[:-1] if len(head) > 1 and head[-2] == GPT2_IDS.end_of_text else head


def link_splits(source: Path, folder: Path, splits: tuple[str, ...]) -> None:
    """Link splits of the source into another folder of shards."""
    for split in splits:
        (folder / split).mkdir(parents=True)
        for shard in list_shards(source, split):
            for suffix in SUFFIXES:
                path = shard.path.with_suffix(suffix)
                os.link(path, folder / split / path.name)


def write_without_blocks(source: Path, folder: Path, block_size: int, dropped: dict[str, list[int]]) -> Path:
    """Write the source's training split without some blocks, link its other splits, and return the folder.

    Blocks are left out as by attribution.curate: a domain with less than one block left is left out.

    Args:
        dropped: domain -> numbers of blocks.
    """
    (folder / "train").mkdir(parents=True)
    for shard in list_shards(source, "train"):
        starts = np.array(sorted(dropped.get(shard.domain, [])), np.int64) * block_size
        if shard.num_tokens - len(starts) * block_size <= block_size:
            continue  # less than one block is left
        ranges = np.stack([starts, starts + block_size], axis=1)
        with (
            ShardWriter(folder / "train", shard.domain, split="train", ids=GPT2_IDS) as writer,
            progress_bar(shard.domain, shard.tokens.nbytes, "B") as bar,
        ):
            cut_shard(shard, [ranges], writer, bar)
    link_splits(source, folder, ("val", "test"))
    return folder


def train(work_dir: Path, name: str, command: tuple[object, ...] = ("main.py",), **flags: object) -> Path:
    """Train GPT2-Tiny, unless the run is finished, and return its folder.

    Args:
        command: arguments of python before the flags.
        flags: of main.py.

    Raises:
        SystemExit: the folder has a run with other flags.
    """
    folder = work_dir / "results" / name
    settings = {
        "architecture": "GPT2-Tiny", "device": "cpu", "eval_iter": 8, "eval_bs": 16, "warmup_step": 20,
        "checkpoint_interval": 1_000_000, "results_dir": work_dir / "results", "run_name": name,
    } | flags  # fmt: skip
    if (folder / "model").exists():
        there = json.loads((folder / "config.json").read_text())
        for key, value in settings.items():
            if str(there[key]) != str(value):
                raise SystemExit(
                    f"{folder} was made with --{key} {there[key]}, not {value}: empty the --work_dir"
                )
        return folder
    switches = ["--overwrite"] if folder.exists() else []
    run_python(*command, *switches, *flags_of(settings))
    return folder


def run_side_by_side(jobs: int, calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """Return the results of these calls, of which `jobs` run at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def compute_sample_values(run: ScoredRun, normalise: Normalise) -> pd.DataFrame:
    """Return the table "samples" of a folder of values, without the samples that have no value."""
    values = write_values([run], run.folder / "values", normalise=normalise)
    return values.read("samples").to_pandas().dropna(subset="value")


def compute_auroc(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> float:
    """Return the probability that one of `low` is below one of `high`; ties count half (Mann-Whitney)."""
    ranks = pd.Series(np.concatenate([low, high])).rank().to_numpy()
    below = ranks[len(low) :].sum() - len(high) * (len(high) + 1) / 2
    return float(below / (len(low) * len(high)))


def read_last_losses(folder: Path) -> dict[str, float]:
    """Return the losses of a run's last evaluation, by split."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "loss/val" in record][-1]
    return {split: last[f"loss/{split}"] for split in SPLITS}
