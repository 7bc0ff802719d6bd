"""Kill a run at random moments, resume it each time, and compare the result with an undisturbed run.

    python -m benchmarks.kill_and_resume --kills 20 --seed 0

Each kill follows a plan:
- "time 0.52": kill -9 after 0.52 seconds.
- "drop_rows_from 3 before" (or "after"): kill -9 before (or after) the third call that changes files, counted
  from that function on: a write, a rename, a removal or a sync.
- "train 2 4000": at the second write, the kernel ends the process once a file has 4000 bytes (SIGXFSZ, which
  the program does not handle). This leaves part of a file on the disk.

A resume that is to be killed in remove_after starts from the oldest checkpoint.

In the end, model and optimizer state must be equal bit by bit, each score row must be there once, the records
of metrics.jsonl must be equal except for times, and no partial file may be left.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import GPT2LMHeadModel

import main as program
import training_loop
from benchmarks.launch import flags_of, fork
from run import log as run_log
from run import method, opening
from run.checkpoint import list_checkpoints
from run.folder import LOCK

SETTINGS = {
    "architecture": "GPT2-Tiny", "device": "cpu", "block_size": 16, "batch_size": 2, "max_steps": 40,
    "eval_interval": 7, "eval_iter": 1, "checkpoint_interval": 3, "keep_checkpoints": 3,
    "dot_prod_save_interval": 2, "warmup_step": 5, "run_name": "run",
}  # fmt: skip
WRITES = (
    (pq, "write_table"),
    (GPT2LMHeadModel, "save_pretrained"),
    (torch, "save"),
    (Path, "write_text"),
    (shutil, "copy"),
)
CHANGES = (
    (os, "replace"),
    (os, "unlink"),
    (os, "fsync"),
    (os, "mkdir"),
    (os, "symlink"),
    (shutil, "rmtree"),
    (Path, "rename"),
)
# Functions from which calls are counted: the start, what a resume changes, the training.
PLACES = {
    "start": (program, "resolve"),
    "remove_after": (opening, "remove_after"),
    "drop_rows_from": (method, "drop_rows_from"),
    "keep_records_before": (run_log, "keep_records_before"),
    "train": (training_loop.Trainer, "run"),
}
# Number of calls and bytes of the largest file: in 40 training steps, and elsewhere.
TRAINING, ELSEWHERE = (300, 2.5e7), (12, 8e3)


def run_doomed(plan: str, flags: list[str]) -> int:
    """Run main.py in this process, which will be killed as planned."""
    place, number, *how = plan.split()
    if place == "time":
        timer = threading.Timer(float(number), os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        return program.main(flags)
    owner, name = PLACES[place]
    function = getattr(owner, name)

    def reached(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, function)
        arm(int(number), *how)
        return function(*args, **kwargs)

    setattr(owner, name, reached)
    return program.main(flags)


def arm(number: int, how: str) -> None:
    """Make the call with this number kill the process, counted from now."""
    calls = iter(range(1, sys.maxsize))
    for owner, name in WRITES if how.isdigit() else WRITES + CHANGES:
        setattr(owner, name, killing(getattr(owner, name), lambda: next(calls) == number, how))


def killing(function: Callable[..., Any], due: Callable[[], bool], how: str) -> Callable[..., Any]:
    """Wrap a function so that its call kills the process when `due`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not due():
            return function(*args, **kwargs)
        what = [part.name for part in args if isinstance(part, Path)]
        print(f"\nkilled in {function.__name__} {' '.join(what)}", file=sys.stderr, flush=True)
        if how.isdigit():
            limit_files(int(how))
        if how != "before":
            function(*args, **kwargs)
        return os.kill(os.getpid(), signal.SIGKILL)

    return wrapped


def limit_files(size: int) -> None:
    """Make a write beyond this size end the process. The part below it is written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores the signal and raises an OSError instead
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class RandomPlans:
    """Draw plans. Called with (whether the run is resumed, seconds that a whole run takes)."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def __call__(self, resumes: bool, seconds: float) -> str:
        draw = self.draw
        if draw.random() < 0.2:
            return f"time {draw.uniform(0, seconds):.3f}"
        later = ["remove_after", "drop_rows_from", "keep_records_before"] if resumes else []
        place = draw.choice(["start", "train", "train", *later])
        calls, size = TRAINING if place == "train" else ELSEWHERE
        how = draw.choice(["before", "after", f"{size ** draw.random():.0f}"])
        return f"{place} {draw.randrange(1, calls // 5 if how.isdigit() else calls)} {how}"


Plans = Callable[[bool, float], str]


def start(action: Callable[..., int | None], *arguments: object, folder: Path) -> tuple[int | None, str]:
    """Run an action in a process and wait for its end. Return its exit status and its stderr."""
    process = fork(action, *arguments, output=folder / "said", environment={})
    process.join()
    return process.exitcode, (folder / "said.err").read_text()


def run_disturbed(
    folder: Path, kills: int, plans: Plans, seconds: float, settings: dict[str, object]
) -> list[str]:
    """Run to the end with this many kills. Return one line per kill."""
    happened: list[str] = []
    flags = flags_of(settings | {"results_dir": folder})
    while True:
        checkpoints = list_checkpoints(folder / "run" / "checkpoints")
        resumes = bool(checkpoints)
        how = ["--resume"] if resumes else ["--overwrite"]
        if len(happened) >= kills:
            status, said = start(program.main, flags + how, folder=folder)
            if status != 0:
                raise SystemExit(f"after {happened}, the last part failed:\n{said}")
            return happened
        plan = plans(resumes, seconds)
        if plan.startswith("remove_after"):  # after the newest checkpoint there would be nothing to remove
            how = ["--resume_from", checkpoints[0].name]
        status, said = start(run_doomed, plan, flags + how, folder=folder)
        if status == 0:  # it ended before the kill: start over
            shutil.rmtree(folder / "run")
        elif status not in (-signal.SIGKILL, -signal.SIGXFSZ):
            raise SystemExit(f"after {happened}, {plan}: status {status}\n{said}")
        else:
            where = [line for line in said.splitlines() if line.startswith("killed in ")]
            newest = [path.name for path in list_checkpoints(folder / "run" / "checkpoints")[-1:]]
            happened.append(f"{plan}: {' '.join(where)}, newest checkpoint {' '.join(newest) or 'none'}")


def differences(run: Path, alone: Path) -> list[str]:
    """Return in what the results of two runs differ, and the partial files that are left."""
    found = []
    if (run / "model" / "model.safetensors").read_bytes() != (
        alone / "model" / "model.safetensors"
    ).read_bytes():
        found.append("parameters")
    states = [
        torch.load(each / "model" / "trainer_state.pt", weights_only=True)["optimizer"]
        for each in (run, alone)
    ]
    if flat(states[0]) != flat(states[1]):
        found.append("optimizer state")
    tables = [
        pq.read_table(each / "grad_dotprods").sort_by([("step", "ascending"), ("sample_id", "ascending")])
        for each in (run, alone)
    ]
    if tables[0].to_pylist() != tables[1].to_pylist():
        found.append("scores")
    if records(run) != records(alone):
        found.append("metrics.jsonl")
    left = [str(path.relative_to(run)) for path in run.rglob(".*") if path.name != LOCK]
    return found + left


def flat(state: Any) -> Any:
    """Convert tensors in nested dictionaries to lists, which can be compared."""
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [flat(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


def records(run: Path) -> list[dict[str, float]]:
    """Return the records of metrics.jsonl without times."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]


def compare(folder: Path, kills: int, plans: Plans, **settings: object) -> tuple[list[str], list[str]]:
    """Compare a run that is killed this often with an undisturbed one.

    Args:
        settings: added to SETTINGS.

    Returns:
        One line per kill; the differences.
    """
    all_settings = SETTINGS | settings
    for name in ("alone", "disturbed"):
        (folder / name).mkdir()
    began = time.monotonic()
    flags = flags_of(all_settings | {"results_dir": folder / "alone"})
    status, said = start(program.main, flags, folder=folder / "alone")
    if status != 0:
        raise SystemExit(f"the undisturbed run failed:\n{said}")
    seconds = time.monotonic() - began
    happened = run_disturbed(folder / "disturbed", kills, plans, seconds, all_settings)
    return happened, differences(folder / "disturbed" / "run", folder / "alone" / "run")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks.kill_and_resume", allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        happened, found = compare(Path(folder), args.kills, RandomPlans(args.seed))
    print("\n".join(happened))
    if found:
        raise SystemExit(f"after {len(happened)} kills, seed {args.seed}: other {', '.join(found)}")
    print(f"after {len(happened)} kills, seed {args.seed}: the same run")


if __name__ == "__main__":
    main(sys.argv[1:])
