"""What the experiments on attribution share: the sample as shards, runs of main.py, rank statistics.

They need a folder with pile/{train,val,test}.jsonl in the Pile's format, PILE_SAMPLE_DIR, and tiktoken's
vocabulary of GPT-2 (TIKTOKEN_CACHE_DIR, or a network)."""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from attribution.curate.curated_folder import SUFFIXES
from attribution.curate.cut_shards import cut
from attribution.scored_run import ScoredRun
from attribution.values import write_values
from benchmarks.launch import ROOT, flags_of
from data_processing.shards import EOT, Shard, ShardWriter, list_shards
from foundation.paths import expand_home, path_argument
from foundation.progress import progress_bar

SPLITS = ("train", "val", "test")


def experiment_parser(name: str, about: str) -> argparse.ArgumentParser:
    """With the options that all experiments have."""
    parser = argparse.ArgumentParser(name, description=about, allow_abbrev=False)
    parser.add_argument(
        "--work_dir", type=path_argument, required=True, help="shards and runs; what is there is used"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=400)
    return parser


def python(*arguments: object) -> None:
    """A command in a process of its own, with one thread; its output is shown if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, arguments))} failed:\n{done.stdout}{done.stderr}")


def sample_shards(folder: Path) -> Path:
    """The three splits of the sample, tokenized with gpt2, unless they are there already."""
    if "PILE_SAMPLE_DIR" not in os.environ:
        raise SystemExit("set PILE_SAMPLE_DIR to a folder with pile/train.jsonl, val.jsonl and test.jsonl")
    sample = Path(expand_home(os.environ["PILE_SAMPLE_DIR"], "PILE_SAMPLE_DIR")) / "pile"
    for split in SPLITS:
        if not (folder / split).exists():
            python(
                "-m", "data_processing.tokenize_pile", "--input", sample / f"{split}.jsonl", "--split", split,
                "--output_dir", folder, "--tokenizer", "gpt2",
            )  # fmt: skip
    return folder


def write_split(folder: Path, split: str, tokens: dict[str, npt.NDArray[np.uint16]]) -> None:
    """Shards of one split: of each domain its tokens, whole documents with their END_OF_TEXT."""
    (folder / split).mkdir(parents=True)
    for domain, each in tokens.items():
        with ShardWriter(folder / split, domain, split=split, tokenizer="gpt2") as shard:
            shard.extend(np.asarray(each, dtype="<u2"))


def head_of(shard: Shard, tokens: int) -> npt.NDArray[np.uint16]:
    """The first tokens of a shard, the last of which becomes an END_OF_TEXT; all, if there are no more."""
    head = np.array(shard.tokens[:tokens])
    head[-1] = EOT
    return head[:-1] if len(head) > 1 and head[-2] == EOT else head


def link_splits(source: Path, folder: Path, splits: tuple[str, ...]) -> None:
    """The source's own splits in another folder of shards."""
    for split in splits:
        (folder / split).mkdir(parents=True)
        for shard in list_shards(source, split):
            for suffix in SUFFIXES:
                path = shard.path.with_suffix(suffix)
                os.link(path, folder / split / path.name)


def without_blocks(source: Path, folder: Path, block_size: int, dropped: dict[str, list[int]]) -> Path:
    """The source's training split without these blocks of each domain, as attribution.curate leaves them out
    (a domain of which less than a block stays as a whole), and its other splits."""
    (folder / "train").mkdir(parents=True)
    for shard in list_shards(source, "train"):
        starts = np.array(sorted(dropped.get(shard.domain, [])), np.int64) * block_size
        if shard.num_tokens - len(starts) * block_size <= block_size:
            continue  # less than a block would stay
        ranges = np.stack([starts, starts + block_size], axis=1)
        with (
            ShardWriter(folder / "train", shard.domain, split="train", tokenizer="gpt2") as writer,
            progress_bar(shard.domain, shard.tokens.nbytes, "B") as bar,
        ):
            cut(shard, [ranges], writer, bar)
    link_splits(source, folder, ("val", "test"))
    return folder


def train(work_dir: Path, name: str, command: tuple[object, ...] = ("main.py",), **flags: object) -> Path:
    """The folder of a run of GPT2-Tiny by main.py, or by a command that takes its flags, unless it is there
    already. SystemExit if what is there is a run with other flags."""
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
    python(*command, *switches, *flags_of(settings))
    return folder


def side_by_side(jobs: int, calls: list) -> list:
    """The results of these calls, so many of which run at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def sample_values(run: ScoredRun, **options: object) -> pd.DataFrame:
    """sample_id, domain, block, value, ... of the samples that have a value."""
    values = write_values([run], run.folder / "values", **options)
    return values.read("samples").to_pandas().dropna(subset="value")


def auroc(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> float:
    """The probability that one of `low` is below one of `high`, ties counted half (Mann and Whitney 1947)."""
    ranks = pd.Series(np.concatenate([low, high])).rank().to_numpy()
    below = ranks[len(low) :].sum() - len(high) * (len(high) + 1) / 2
    return float(below / (len(low) * len(high)))


def last_losses(folder: Path) -> dict[str, float]:
    """What the last evaluation of a run found, by split."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "loss/val" in record][-1]
    return {split: last[f"loss/{split}"] for split in SPLITS}
