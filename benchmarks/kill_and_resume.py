"""Kills a run at random moments with kill -9, resumes it each time, and compares the end with a run that was
left alone.

    python -m benchmarks.kill_and_resume --kills 20 --seed 0

Every second kill comes at a random time of the training, the others at a random call of what writes scores
and checkpoints (a rename, a removal, a sync, the write of a file: before or after it). In the end the model
and the optimizer's state must be the same to the last bit, the scores the same rows, each once, and the
records of metrics.jsonl the same but for the times."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "architecture": "GPT2-Tiny", "device": "cpu", "block_size": 16, "batch_size": 2, "max_steps": 40,
    "eval_interval": 7, "eval_iter": 1, "checkpoint_interval": 3, "dot_prod_save_interval": 2,
    "warmup_step": 5, "run_name": "run",
}  # fmt: skip
WRITING = (
    (os, "replace"),
    (os, "unlink"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (Path, "rename"),
    (torch, "save"),
)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing(function: Callable[..., Any], calls: "Countdown", after: bool) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        due = calls.next()
        if due and not after:
            kill()
        result = function(*args, **kwargs)
        if due:
            kill()
        return result

    return wrapped


class Countdown:
    def __init__(self, number: int) -> None:
        self.left = number

    def next(self) -> bool:
        self.left -= 1
        return self.left == 0


def doomed(plan: str, flags: list[str]) -> None:
    """Runs main.py in this process, which will be killed as planned: "time 1.25" or "call 17 after"."""
    import main
    import training_loop

    kind, number, *when = plan.split()
    train = training_loop.Trainer.run

    def run(self: Any) -> None:
        if kind == "time":
            timer = threading.Timer(float(number), kill)
            timer.daemon = True
            timer.start()
        else:
            calls = Countdown(int(number))
            for owner, name in WRITING:
                setattr(owner, name, killing(getattr(owner, name), calls, when == ["after"]))
        train(self)

    training_loop.Trainer.run = run
    sys.exit(main.main(flags))


def flags_of(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def start(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def plans(seed: int, seconds: float) -> Any:
    """When each kill comes; seconds: what the whole training takes."""
    draw = random.Random(seed)
    while True:
        yield f"time {draw.uniform(0, seconds):.3f}"
        yield f"call {draw.randrange(1, 120)} {draw.choice(['before', 'after'])}"


def disturbed(folder: Path, kills: int, seed: int, seconds: float, settings: dict[str, object]) -> list[str]:
    """Runs to the end in spite of so many kills. Returns what happened, a line for each."""
    happened: list[str] = []
    coming = plans(seed, seconds)
    while True:
        flags = flags_of(settings | {"results_dir": folder})
        if any((folder / "run" / "checkpoints").glob("step_*")):
            flags.append("--resume")
        elif (folder / "run").exists():
            flags.append("--overwrite")
        if len(happened) >= kills:
            done = start(["main.py", *flags])
            if done.returncode != 0:
                raise SystemExit(f"the last part failed:\n{done.stderr}")
            return happened
        plan = next(coming)
        done = start(["-m", "benchmarks.kill_and_resume", "--doomed", plan, *flags])
        if done.returncode == 0:  # it came to its end before it could be killed: begin again
            shutil.rmtree(folder / "run")
        elif done.returncode != -signal.SIGKILL:
            raise SystemExit(f"after {happened}, {plan}: status {done.returncode}\n{done.stderr}")
        else:
            there = sorted(path.name for path in (folder / "run").rglob("step*"))
            happened.append(f"{plan}: newest {there[-1] if there else 'nothing'}")


def differences(run: Path, alone: Path) -> list[str]:
    """In what the results of two runs differ."""
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
    return found


def flat(state: Any) -> Any:
    """Nested dictionaries with tensors as plain lists, which can be compared."""
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [flat(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


def records(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]


def compare(folder: Path, kills: int, seed: int, **settings: object) -> tuple[list[str], list[str]]:
    """(what happened, differences) of a run that was killed so often; settings: other than SETTINGS."""
    all_settings = SETTINGS | settings
    began = time.monotonic()
    done = start(["main.py", *flags_of(all_settings | {"results_dir": folder / "alone"})])
    if done.returncode != 0:
        raise SystemExit(f"the undisturbed run failed:\n{done.stderr}")
    seconds = max(1.0, time.monotonic() - began - 6)  # importing takes some
    happened = disturbed(folder / "disturbed", kills, seed, seconds, all_settings)
    return happened, differences(folder / "disturbed" / "run", folder / "alone" / "run")


def main(argv: list[str]) -> None:
    if argv[:1] == ["--doomed"]:
        doomed(argv[1], argv[2:])
    parser = argparse.ArgumentParser("benchmarks.kill_and_resume", allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        happened, found = compare(Path(folder), args.kills, args.seed)
    print("\n".join(happened))
    if found:
        raise SystemExit(f"after {len(happened)} kills, seed {args.seed}: other {', '.join(found)}")
    print(f"after {len(happened)} kills, seed {args.seed}: the same run")


if __name__ == "__main__":
    main(sys.argv[1:])
