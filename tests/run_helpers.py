"""Tiny shards, and short runs of main.py on them, with what they print and the model they trained."""

import io
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

import main
import model_setup
from benchmarks.launch import flags_of, fork, world_of
from config_file import TrainingConfig
from data_processing.shards import GPT2_BYTES_IDS, ShardWriter, domain_file_name
from data_processing.tokenizers import get_tokenizer
from models.causal_lm import CausalLM

ROOT = Path(__file__).parent.parent
DOMAINS = ("Alpha", "Beta [b]")
DOCUMENTS = {"train": 12, "val": 4, "test": 4}  # of each domain, some 400 tokens each
WORDS = [
    "tensor",
    "gradient",
    "der",
    "Straße",
    "naïve",
    "2024",
    "[bold]",
    ":tada:",
    "of",
    "a",
    "the",
    "\x1b[31m",
]


def write_shards(folder: Path) -> Path:
    """Two domains in each of the three splits."""
    for split, documents in DOCUMENTS.items():
        (folder / split).mkdir(parents=True)
        for domain in DOMAINS:
            texts = random.Random(f"{split} {domain}")
            with ShardWriter(folder / split, domain, split=split, ids=GPT2_BYTES_IDS) as shard:
                for _ in range(documents):
                    text = " ".join(texts.choices(WORDS, k=70))
                    shard.append(get_tokenizer("gpt2_bytes").encode(text))
    return folder


def tokens_of(data: Path, split: str, domain: str, block: int, block_size: int) -> torch.Tensor:
    """(block_size + 1,) int64, read without the project's code."""
    tokens = np.fromfile(data / split / f"{domain_file_name(domain)}.bin", "<u2")
    return torch.from_numpy(tokens[block * block_size : (block + 1) * block_size + 1].astype(np.int64))


def command(data: Path, results: Path, **flags: object) -> list[str]:
    """A command line for a run of a few seconds; a flag that is True is a switch.

    Its scores are plain dot products, of every step, unless the flags say otherwise."""
    plain = {"direction": "gradient", "audit_interval": 0}
    flags = ({} if flags.get("method") == "Regular" or flags.get("eval_only") else plain) | {
        "pile_data_dir": data, "results_dir": results, "architecture": "GPT2-Tiny", "device": "cpu",
        "block_size": 8, "batch_size": 2, "max_steps": 4, "eval_iter": 1, "warmup_step": 2, "seed": 5,
    } | flags  # fmt: skip
    return flags_of(flags)


@dataclass
class Run:
    """status: what main returned; folder: of the results; out, err: what was printed; models: copies of the
    model as built, and the model itself as it is after the run."""

    status: int
    folder: Path
    out: str
    err: str
    built: list[tuple[CausalLM, CausalLM]] = field(default_factory=list)

    @property
    def initial(self) -> CausalLM:
        return self.built[0][0]

    @property
    def model(self) -> CausalLM:
        return self.built[0][1]

    def metrics(self) -> pd.DataFrame:
        """A row for each step, without the evaluations."""
        return pd.DataFrame([record for record in self.records() if "train_loss" in record])

    def evaluations(self) -> list[dict]:
        return [record for record in self.records() if "loss/val" in record]

    def records(self) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line, parse_constant=reject_constant) for line in lines]

    def scores(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "grad_dotprods").astype({"domain": str})


def reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@contextmanager
def one_thread() -> Iterator[None]:
    """Small steps gain nothing from more, and lose much where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(data: Path, results: Path, **flags: object) -> Run:
    """Runs main.py's main(). An interrupt that it lets through would end the tests: an error instead."""
    run = Run(-1, results / str(flags.get("run_name")), "", "")
    build = model_setup.build_model

    def build_model(config: TrainingConfig) -> CausalLM:
        model = build(config)
        run.built.append((deepcopy(model), model))
        return model

    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        one_thread(),
        patch.object(model_setup, "build_model", build_model),
    ):
        try:
            run.status = main.main(command(data, results, **flags))
        except KeyboardInterrupt as error:
            raise AssertionError("KeyboardInterrupt came out of main()") from error
    run.out, run.err = out.getvalue(), err.getvalue()
    return run


class TwoProcesses:
    """A run of main.py's main() in two processes, as torchrun starts them, but forked from one that has
    imported everything. before: a function of a module, called first in each; RANK in its environment tells
    which it is."""

    def __init__(
        self, data: Path, results: Path, *, before: Callable[[], object] | None = None, **flags: Any
    ) -> None:
        self.folder = results / str(flags["run_name"])
        self.said = [results / f"{flags['run_name']}-rank-{rank}" for rank in (0, 1)]
        self.store, worlds = world_of(2)
        self.processes = [
            fork(
                _main_after, before, command(data, results, **flags), output=said,
                environment=environment(results) | world,
            )
            for said, world in zip(self.said, worlds, strict=True)
        ]  # fmt: skip

    def ended(self, *statuses: int) -> Run:
        """Waits for both and checks their exit statuses (without any: both are 0). err: of one, then of the
        other."""
        deadline = time.monotonic() + 60
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        found = tuple(process.exitcode for process in self.processes)
        for process in self.processes:
            process.kill()
        out, err = (
            "".join(Path(f"{each}.{kind}").read_text() for each in self.said) for kind in ("out", "err")
        )
        assert found == (statuses or (0, 0)), f"{found}\n{err}"
        status = found[0]
        assert status is not None
        return Run(status, self.folder, out, err)


def _main_after(before: Callable[[], object] | None, flags: list[str]) -> int:
    if before is not None:
        before()
    return main.main(flags)


def python(*arguments: object) -> list[str]:
    """A command that runs Python in its own process."""
    return [sys.executable, *map(str, arguments)]


def environment(folder: Path) -> dict[str, str]:
    """For a process that has this folder as its home, one thread, and no network."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return {
        **os.environ,
        **nowhere,
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "",
        "no_proxy": "",
    }


def calling(action: Callable[[], object], function: Callable) -> Callable:
    """The function, with an action before each of its calls."""

    def called(*args: Any, **kwargs: Any) -> Any:
        action()
        return function(*args, **kwargs)

    return called


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with its size and time of change."""
    entries = sorted(folder.rglob("*"))
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in entries}
