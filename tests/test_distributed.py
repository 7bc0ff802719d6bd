"""Several processes and several micro-batches: the numbers of one process with the one large batch."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from cases import T, fused_gpt2
from run_helpers import ROOT, Run, TwoProcesses, command, environment, start
from transformers import GPT2LMHeadModel

import training_loop
from benchmarks.launch import torchrun, world_of
from config_file import TrainingConfig, resolve
from data_processing.shard_files import ShardError
from dataloader import TrainingData
from evaluation import evaluate
from foundation.errors import ConfigError
from ghostEngines.engine_manager import GhostEngineManager
from run import checkpoint
from run import processes as distributed
from run.log import RunLog
from run.processes import World, distributed_world, first_of_machine, launched
from run.state import TrainingState
from training_loop import Trainer

FLAGS: dict[str, Any] = {
    "model_dtype": "float64",
    "val_batch_size": 3,
    "max_steps": 4,
    "eval_interval": 2,
    "eval_iter": 3,
    "eval_bs": 2,
    "learning_rate": 1e-2,
    "grad_clip": 0.5,
    "direction": "auto",
}


@pytest.fixture(scope="module")
def alone(data: Path, results: Path) -> Run:
    run = start(data, results, run_name="alone", batch_size=4, **FLAGS)
    assert run.status == 0
    return run


def assert_same(run: Run, want: Run, tolerance: float = 1e-10) -> None:
    """Losses, evaluations, parameters and scores; no sample twice, none missing."""
    for mine, other in zip(run.records(), want.records(), strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"time", "tokens_per_second"}:
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=1e-14), name
    assert_same_parameters(run, want, tolerance)
    scores = [each.scores().sort_values(["step", "sample_id"]) for each in (run, want)]
    assert (scores[0].groupby("step").size() == 4).all() and not scores[0].duplicated(
        ["step", "sample_id"]
    ).any()
    for column in ("step", "sample_id", "domain", "block", "global_batch_size", "lr"):
        assert scores[0][column].tolist() == scores[1][column].tolist()
    for column in ("dot_product", "train_loss", "value", "clip_factor"):
        mine, other = (each[column].to_numpy() for each in scores)
        assert (np.isnan(mine) == np.isnan(other)).all()
        assert np.nanmax(np.abs(mine - other)) <= tolerance * np.nanmax(np.abs(other)), column


def assert_same_parameters(run: Run, want: Run, tolerance: float = 1e-10) -> None:
    models = [GPT2LMHeadModel.from_pretrained(each.folder / "model") for each in (run, want)]
    for mine, other in zip(*(model.parameters() for model in models), strict=True):
        assert mine.dtype == torch.float64
        assert (mine - other).norm() <= tolerance * other.norm()


def test_micro_batches_are_the_large_batch(alone: Run, data: Path, results: Path) -> None:
    run = start(data, results, run_name="micro", batch_size=2, gradient_accumulation_steps=2, **FLAGS)
    assert run.status == 0
    assert_same(run, alone)


def test_regular_micro_batches_train_the_same(alone: Run, data: Path, results: Path) -> None:
    flags = FLAGS | {"method": "Regular", "gradient_accumulation_steps": 4}
    run = start(data, results, run_name="regular", batch_size=1, **flags)
    assert_same_parameters(run, alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(parallel: str, alone: Run, data: Path, results: Path) -> None:
    """With two micro-batches of one row; with one of two rows, below, where a signal stops the run."""
    flags = FLAGS | {"parallel": parallel, "gradient_accumulation_steps": 2}
    run = TwoProcesses(data, results, run_name=parallel, batch_size=1, **flags).ended()
    assert_same(run, alone)
    assert set(run.scores()["rank"]) == {0, 1}
    assert run.err.count("after step 3: loss") == 1 and run.out.count("loss on val") == 1  # rank 0 alone


@pytest.mark.parametrize(("granularity", "more"), [("per_layer", {"activation_checkpointing": True})])
def test_divided_parameters_and_parts_of_scores(
    granularity: str, more: dict[str, Any], data: Path, results: Path
) -> None:
    """And activations made again, with the parameters gathered once more for it."""
    flags = FLAGS | {"score_granularity": granularity, "max_steps": 2, "direction": "gradient"}
    alone = start(data, results, run_name=granularity, batch_size=4, **flags)
    flags |= {"parallel": "fsdp", **more}
    run = TwoProcesses(data, results, run_name=f"fsdp-{granularity}", batch_size=2, **flags).ended()
    assert_same(run, alone)
    mine, other = (
        np.stack(each.scores().sort_values(["step", "sample_id"])[granularity].tolist())
        for each in (run, alone)
    )
    assert mine.shape == (8, {"pairwise": 3, "per_layer": 16}[granularity])
    assert np.abs(mine - other).max() <= 1e-10 * np.abs(other).max()


def test_regular_with_divided_parameters_trains_the_same(alone: Run, data: Path, results: Path) -> None:
    flags = FLAGS | {"method": "Regular", "parallel": "fsdp", "activation_checkpointing": True}
    run = TwoProcesses(data, results, run_name="fsdp-regular", batch_size=2, **flags).ended()
    assert_same_parameters(run, alone)


def test_a_run_goes_on_with_other_processes(alone: Run, data: Path, results: Path) -> None:
    """Two processes with DDP make two steps; one goes on with micro-batches, then two with FSDP: the same
    run."""
    flags = FLAGS | {"run_name": "moved", "lr_decay_steps": 4, "eval_interval": 2}
    TwoProcesses(data, results, batch_size=2, **flags | {"max_steps": 2}).ended()
    again: dict[str, Any] = {"resume": True, **flags}
    second = start(data, results, batch_size=2, gradient_accumulation_steps=2, **again | {"max_steps": 3})
    assert second.status == 0
    third: dict[str, Any] = {"batch_size": 1, "gradient_accumulation_steps": 2, "parallel": "fsdp"}
    run = TwoProcesses(data, results, **third, **again).ended()
    extra = [record for record in run.records() if record["step"] == 2 and "loss/val" in record]
    assert len(extra) == 1  # the one at the end of the second part
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not ('"step": 2' in line and "loss/val" in line)]
    (run.folder / "metrics.jsonl").write_text("".join(kept))
    assert_same(run, alone)


def test_the_first_process_decides_whether_to_go_on(data: Path, tmp_path: Path) -> None:
    """--resume auto: a run of one process, and then of two, under one command line."""
    flags: dict[str, Any] = {"run_name": "a", "method": "Regular", "lr_decay_steps": 4, "resume": "auto"}
    assert start(data, tmp_path, batch_size=2, max_steps=1, **flags).status == 0
    run = TwoProcesses(data, tmp_path, batch_size=1, max_steps=2, **flags).ended()
    assert run.err.count("resuming from") == 1 and run.metrics().step.tolist() == [0, 1]


def test_another_process_than_the_first_gathers_nothing_for_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without FSDP: the optimizer's state is twice the model's size."""
    model = fused_gpt2(tied=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    x = torch.zeros(1, T, dtype=torch.long)
    model(x, x).mean().backward()
    optimizer.step()
    gathered: list[tuple[object, ...]] = []
    monkeypatch.setattr(checkpoint, "optimizer_state", lambda *args, **kwargs: gathered.append(args))
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *args: None)
    state = TrainingState(model, model, optimizer, torch.amp.GradScaler(enabled=False), GhostEngineManager())
    config = resolve(TrainingConfig(run_name="a", device="cpu"), {})
    for rank, count in ((1, 0), (0, 1)):
        state.save(config, World(rank, 2), {})
        assert len(gathered) == count


# ---- a process that fails, and signals. What is done to the processes is done by functions of this module.


def in_the_second(action: Callable[[], object]) -> None:
    if os.environ["RANK"] == "1":
        action()


def in_step_2(action: Callable[[], object]) -> None:
    step = Trainer._step

    def acting(self: Trainer, number: int) -> None:
        if number == 2:
            action()
        step(self, number)

    patch.object(Trainer, "_step", acting).start()


def broken() -> None:
    raise RuntimeError("broken")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def second_is_broken() -> None:
    in_the_second(lambda: in_step_2(broken))


def second_is_killed() -> None:
    in_the_second(lambda: in_step_2(killed))


@pytest.mark.parametrize(
    ("before", "status"), [(second_is_broken, 1), (second_is_killed, -9)], ids=["raises", "killed"]
)
def test_a_process_that_fails_ends_the_other(
    before: Callable[[], None], status: int, data: Path, tmp_path: Path
) -> None:
    TwoProcesses(data, tmp_path, before=before, run_name="a", max_steps=100_000).ended(1, status)


def log_that_cannot_be_closed() -> None:
    def close(self: object, *error: object) -> None:
        raise OSError("no space left")

    patch.object(RunLog, "__exit__", close).start()


def test_a_log_that_cannot_be_closed_is_no_good_end_for_any(data: Path, tmp_path: Path) -> None:
    before = log_that_cannot_be_closed
    run = TwoProcesses(data, tmp_path, before=before, run_name="a", max_steps=1).ended(1, 1)
    assert "no space left" in run.err


def second_finds_no_shard() -> None:
    def missing(*args: object) -> None:
        raise ShardError("val: no shard")

    in_the_second(lambda: patch.object(TrainingData, "open", missing).start())


@pytest.mark.parametrize(
    ("before", "flags", "said"),
    [
        (None, {"batch_size": 0}, "--batch_size 0: must be at least 1"),  # before they know of each other
        (None, {"val_set": "val:Gamma"}, "Gamma in "),
        (None, {"resume": True}, "--resume --run_name a: "),  # which the first alone looks for
        (second_finds_no_shard, {}, "process 1: val: no shard"),
    ],
    ids=["flag", "data", "folder", "in the second"],
)
def test_what_cannot_be_run_is_said_once(
    before: Callable[[], object] | None, flags: dict[str, Any], said: str, data: Path, tmp_path: Path
) -> None:
    run = TwoProcesses(data, tmp_path, before=before, run_name="a", **flags).ended(2, 2)
    assert run.err.count("error: ") == 1 and said in run.err and "Traceback" not in run.err
    assert run.err.count("usage") == ("batch_size" in flags) and run.out == ""
    assert not run.folder.exists()


def wait_for_records(folder: Path, running: Callable[[], bool]) -> None:
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and running()
        time.sleep(0.05)


def assert_stopped_at_one_step(run: Run) -> None:
    """A checkpoint, and the scores of all, up to one step."""
    (folder,) = (run.folder / "checkpoints").iterdir()
    steps = checkpoint.step_of(folder)
    assert run.err.count(f"interrupted after step {steps}") == 1
    sizes = run.scores().groupby("step").size()
    assert sizes.index.tolist() == list(range(steps)) and (sizes == 4).all()
    assert pd.DataFrame(run.records()).step.max() == steps - 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_one_process_stops_them_all_at_one_step(
    number: signal.Signals, data: Path, tmp_path: Path
) -> None:
    two = TwoProcesses(data, tmp_path, run_name="a", max_steps=100_000)
    wait_for_records(two.folder, lambda: all(process.is_alive() for process in two.processes))
    pid = two.processes[1].pid
    assert pid is not None
    os.kill(pid, number)
    assert_stopped_at_one_step(two.ended(128 + number, 128 + number))


def second_gets_a_signal_in_an_evaluation() -> None:
    """In its second batch: the first process is at another place by then."""

    def signalled(model, data, config, precision, world, between):
        calls = iter(range(100))

        def signalling() -> None:
            if next(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            between()

        return evaluate(model, data, config, precision, world, signalling)

    in_the_second(lambda: patch.object(training_loop, "evaluate", signalled).start())


@pytest.mark.parametrize("parallel", ["ddp"])
def test_a_signal_in_an_evaluation_of_several(parallel: str, alone: Run, data: Path, tmp_path: Path) -> None:
    """All leave it, and make it when the run goes on."""
    flags = FLAGS | {"run_name": "a", "parallel": parallel, "batch_size": 2}
    before = second_gets_a_signal_in_an_evaluation
    stopped = TwoProcesses(data, tmp_path, before=before, **flags).ended(143, 143)
    assert stopped.evaluations() == [] and "interrupted after step 2" in stopped.err
    run = TwoProcesses(data, tmp_path, resume=True, **flags).ended()
    assert_same(run, alone)


def test_torchrun_passes_a_signal_on(data: Path, tmp_path: Path) -> None:
    """To all, which end as above; none is left over."""
    arguments = torchrun(ROOT / "main.py", *command(data, tmp_path, run_name="a", max_steps=100_000))
    launcher = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_records(tmp_path / "a", lambda: launcher.poll() is None)
    workers = children(launcher.pid)
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and len(workers) == 2
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert_stopped_at_one_step(Run(launcher.returncode, tmp_path / "a", out, err))


def children(pid: int) -> list[str]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return found.stdout.split()


LAUNCHER = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize("missing", distributed.LAUNCHED)
def test_half_of_a_launchers_environment(missing: str) -> None:
    environ = {name: value for name, value in LAUNCHER.items() if name != missing}
    with pytest.raises(ConfigError, match=rf"are set, but not {missing} \(seen: "):
        launched(environ)
    assert first_of_machine(environ), "said twice at worst, and not by none"


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("RANK", "x", "a whole number, 0 to 3"),
        ("RANK", "4", "a whole number, 0 to 3"),
        ("RANK", "-1", "a whole number, 0 to 3"),
        ("RANK", "\u00b2", "a whole number, 0 to 3"),
        ("WORLD_SIZE", "0", "a whole number, 1 or more"),
        ("WORLD_SIZE", "", "a whole number, 1 or more"),
        ("LOCAL_RANK", "2", "a whole number, 0 to 1"),
        ("LOCAL_WORLD_SIZE", "5", "at most WORLD_SIZE, 4"),
        ("MASTER_PORT", "http", "a whole number, 1 to 65535"),
        ("MASTER_ADDR", "", "the name of a machine"),
        ("GROUP_WORLD_SIZE", "two", "a whole number, 1 or more"),
    ],
)
def test_a_launchers_environment_that_is_not_one(name: str, value: str, must: str) -> None:
    environ = LAUNCHER | {name: value}
    with pytest.raises(ConfigError, match=f"environment variable {name} is '{value}', and must be {must}"):
        launched(environ)
    assert first_of_machine(environ)


def test_what_is_no_launchers_environment() -> None:
    """Batch scripts export the first two; SLURM_NTASKS is the allocation's."""
    environ = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert launched(environ) is None and first_of_machine(environ)
    with distributed_world(TrainingConfig(parallel="ddp"), environ) as world:
        assert world.size == 1


@pytest.mark.parametrize(("size", "rank"), distributed.TASKS.items())
def test_tasks_of_one_step_without_a_group(size: str, rank: str) -> None:
    """Nor is a launcher in each of them one, if it knows of itself alone."""
    for environ in ({}, LAUNCHER | {"GROUP_WORLD_SIZE": "1", "LOCAL_RANK": "0"}):
        environ = environ | {size: "2", rank: "0"}
        with (
            pytest.raises(ConfigError, match=rf"2 tasks .* \({size}=2\).*srun --ntasks-per-node=1 "),
            distributed_world(TrainingConfig(parallel="ddp"), environ),
        ):
            pass
        assert first_of_machine(environ) and not first_of_machine(environ | {rank: "1"})


@pytest.mark.parametrize(
    ("place", "tasks"),
    [
        (
            None,
            {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "16", "PMI_SIZE": "1"},
        ),  # in an allocation
        (launched(LAUNCHER), {"SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "2"}),  # torchrun in each of two tasks
        (launched(LAUNCHER | {"LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"}), {}),
    ],
)
def test_tasks_that_know_of_each_other(place: distributed.Place | None, tasks: dict[str, str]) -> None:
    distributed.check_tasks(place, tasks)


def test_one_process_of_each_machine_reports() -> None:
    """Of a machine that is not the first, too: what is wrong there is not wrong on the others."""
    second = LAUNCHER | {"RANK": "2", "LOCAL_RANK": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert first_of_machine(second) and not first_of_machine(second | {"LOCAL_RANK": "1", "RANK": "3"})


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_gpus(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them meets it, so that the first can say it for all."""
    _, worlds = world_of(2)
    for name, value in worlds[rank].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = TrainingConfig(device="cuda", parallel="ddp")
    with (
        pytest.raises(ConfigError, match=r"has 2 processes for 1 GPU\(s\): start 1"),
        distributed_world(config),
    ):
        pass


def test_fsdp_needs_several_processes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(data, tmp_path / "results", parallel="fsdp")
    assert run.status == 2 and "--parallel fsdp divides a model among processes" in run.err
    assert not (tmp_path / "results").exists()
