"""Several processes and several micro-batches: the numbers of one process with the one large batch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from run_helpers import ROOT, Run, command, environment, start, write_shards
from transformers import GPT2LMHeadModel

FLAGS = {
    "model_dtype": "float64",
    "val_batch_size": 3,
    "max_steps": 4,
    "eval_interval": 2,
    "eval_iter": 3,
    "eval_bs": 2,
    "learning_rate": 1e-2,
    "grad_clip": 0.5,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def alone(data: Path, results: Path) -> Run:
    run = start(data, results, run_name="alone", batch_size=4, **FLAGS)
    assert run.status == 0
    return run


def torchrun(data: Path, results: Path, script: Path = ROOT / "main.py", **flags: object) -> subprocess.Popen:
    """Two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*launcher, str(script), *command(data, results, **flags)],
        cwd=ROOT,
        env=environment(results) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen, results: Path, name: str, status: int = 0) -> Run:
    out, err = process.communicate(timeout=120)
    assert (process.returncode == 0) == (status == 0), err
    return Run(status, results / name, out, err)


def assert_same(run: Run, want: Run, tolerance: float = 1e-10) -> None:
    """Losses, evaluations, parameters and scores; no sample twice, none missing."""
    for mine, other in zip(run.records(), want.records(), strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"time", "tokens_per_second"}:
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=1e-14), name
    models = [GPT2LMHeadModel.from_pretrained(each.folder / "model") for each in (run, want)]
    for mine, other in zip(*(model.parameters() for model in models), strict=True):
        assert mine.dtype == torch.float64
        assert (mine - other).norm() <= tolerance * other.norm()
    scores = [each.scores().sort_values(["step", "sample_id"]) for each in (run, want)]
    assert (scores[0].groupby("step").size() == 4).all() and not scores[0].duplicated(
        ["step", "sample_id"]
    ).any()
    for column in ("step", "sample_id", "domain", "block", "global_batch_size", "lr"):
        assert scores[0][column].tolist() == scores[1][column].tolist()
    for column in ("dot_product", "train_loss", "value", "clip_factor"):
        mine, other = (each[column].to_numpy() for each in scores)
        assert np.abs(mine - other).max() <= tolerance * np.abs(other).max(), column


def test_micro_batches_are_the_large_batch(alone: Run, data: Path, results: Path) -> None:
    run = start(data, results, run_name="micro", batch_size=2, gradient_accumulation_steps=2, **FLAGS)
    assert run.status == 0
    assert_same(run, alone)


def test_regular_micro_batches_train_the_same(alone: Run, data: Path, results: Path) -> None:
    flags = FLAGS | {"method": "Regular", "gradient_accumulation_steps": 4}
    run = start(data, results, run_name="regular", batch_size=1, **flags)
    models = [GPT2LMHeadModel.from_pretrained(each.folder / "model") for each in (run, alone)]
    for mine, other in zip(*(model.parameters() for model in models), strict=True):
        assert (mine - other).norm() <= 1e-10 * other.norm()


@pytest.mark.parametrize(
    ("parallel", "batch_size", "accumulation"), [("ddp", 2, 1), ("ddp", 1, 2), ("fsdp", 2, 1), ("fsdp", 1, 2)]
)
def test_two_processes_are_one(
    parallel: str, batch_size: int, accumulation: int, alone: Run, data: Path, results: Path
) -> None:
    name = f"{parallel}-{accumulation}"
    flags = FLAGS | {"parallel": parallel, "gradient_accumulation_steps": accumulation}
    process = torchrun(data, results, run_name=name, batch_size=batch_size, **flags)
    run = finished(process, results, name)
    assert_same(run, alone)
    assert set(run.scores()["rank"]) == {0, 1}
    assert run.err.count("after step 3: loss") == 1 and run.out.count("loss on val") == 1  # rank 0 alone


def test_a_run_goes_on_with_other_processes(alone: Run, data: Path, results: Path) -> None:
    """Two processes with DDP make two steps; one goes on with micro-batches, then two with FSDP: the same
    run."""
    flags = FLAGS | {"lr_decay_steps": 4, "eval_interval": 2}
    first = torchrun(data, results, run_name="moved", batch_size=2, **flags | {"max_steps": 2})
    finished(first, results, "moved")
    again = {"run_name": "moved", "resume": True, **flags}
    second = start(data, results, batch_size=2, gradient_accumulation_steps=2, **again | {"max_steps": 3})
    assert second.status == 0
    third = torchrun(data, results, batch_size=1, gradient_accumulation_steps=2, parallel="fsdp", **again)
    run = finished(third, results, "moved")
    extra = [record for record in run.records() if record["step"] == 2 and "loss/val" in record]
    assert len(extra) == 1  # the one at the end of the second part
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not ('"step": 2' in line and "loss/val" in line)]
    (run.folder / "metrics.jsonl").write_text("".join(kept))
    assert_same(run, alone)


BROKEN = """
import sys
import training_loop, main
original = training_loop.Trainer._step
def step(self, number):
    if number == 2 and self.world.rank == 1:
        {action}
    original(self, number)
training_loop.Trainer._step = step
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "action", ["raise RuntimeError('broken')", "import os; os.kill(os.getpid(), 9)"], ids=["raises", "killed"]
)
def test_a_process_that_fails_ends_them_all(action: str, data: Path, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(action=action))
    process = torchrun(data, tmp_path, script, run_name="a", max_steps=100_000)
    began, workers = time.monotonic(), []
    while process.poll() is None and len(workers) < 2 and time.monotonic() - began < 60:
        workers = children(process.pid)
        time.sleep(0.05)
    finished(process, tmp_path, "a", status=1)
    assert time.monotonic() - began < 60
    assert len(workers) == 2 and not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def children(pid: int) -> list[str]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return found.stdout.split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_them_all_at_one_step(
    number: signal.Signals, data: Path, tmp_path: Path
) -> None:
    """A checkpoint, the scores of all, and an exit status that is not 0."""
    process = torchrun(data, tmp_path, run_name="a", max_steps=100_000)
    metrics = tmp_path / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    workers = children(process.pid)
    os.kill(int(workers[-1]), number)
    run = finished(process, tmp_path, "a", status=1)
    (checkpoint,) = (run.folder / "checkpoints").iterdir()
    steps = int(checkpoint.name.removeprefix("step_"))
    assert f"interrupted after step {steps}" in run.err
    sizes = run.scores().groupby("step").size()
    assert sizes.index.tolist() == list(range(steps)) and (sizes == 4).all()
    assert pd.DataFrame(run.records()).step.max() == steps - 1


def test_fsdp_needs_several_processes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(data, tmp_path / "results", parallel="fsdp")
    assert run.status == 2 and "--parallel fsdp divides a model among processes" in run.err
    assert not (tmp_path / "results").exists()
