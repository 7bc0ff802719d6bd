"""Checkpoints: a run that is stopped in any way goes on as if it had not been."""

import inspect
import json
import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import wandb
from run_helpers import ROOT, Run, calling, command, environment, one_thread, start, tree, write_shards
from transformers import GPT2Config, GPT2LMHeadModel

import evaluation
import main
from attribution.scored_run import ScoredRun
from benchmarks.kill_and_resume import compare, differences
from benchmarks.launch import fork
from config_file import TrainingConfig
from ghostEngines.engine_manager import GhostEngineManager
from run import checkpoint
from run.checkpoint import CheckpointError, list_checkpoints, read_manifest
from run.file_system import bytes_below
from run.processes import World
from run.state import TrainingState, space_needed
from training_loop import Trainer

FLAGS = {"max_steps": 8, "checkpoint_interval": 3, "eval_interval": 2, "dot_prod_save_interval": 2}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Left alone; --keep_checkpoints 3 keeps all."""
    run = start(data, tmp_path_factory.mktemp("alone"), run_name="a", keep_checkpoints=3, **FLAGS)
    assert run.status == 0
    return run


@pytest.fixture
def copied(alone: Run, tmp_path: Path) -> Path:
    """Results with a copy of that run, at its end. The large files, which are replaced and never changed, are
    the same."""

    def copy(source: str, target: str) -> None:
        (os.link if os.path.getsize(source) > 1_000_000 else shutil.copy2)(source, target)

    shutil.copytree(alone.folder, tmp_path / "a", symlinks=True, copy_function=copy)
    return tmp_path


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


def same(run: Run, alone: Run) -> bool:
    return differences(run.folder, alone.folder) == []


# ---- what is there


def test_checkpoints_by_interval_and_at_the_end(alone: Run) -> None:
    assert names(alone.folder) == ["step_000003", "step_000006", "step_000008"]
    assert os.readlink(alone.folder / "model") == "checkpoints/step_000008"
    newest = alone.folder / "checkpoints" / "step_000008"
    assert {path.name for path in newest.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "trainer_state.pt", "run_config.json",
        "manifest.json",
    }  # fmt: skip
    assert GPT2LMHeadModel.from_pretrained(newest).lm_head.weight.shape == (50304, 128)
    assert read_manifest(newest)["step"] == 8


def test_the_size_of_checkpoints_is_foreseen(alone: Run, data: Path) -> None:
    """Of the run before it begins, and of what is left after the second of three checkpoints."""
    config = TrainingConfig.from_command_line(command(data, alone.folder.parent, **FLAGS))
    checkpoint = alone.folder / "checkpoints" / "step_000006"
    space = space_needed(config, World(0, 1), alone.model, None)
    assert space.one == pytest.approx(bytes_below(checkpoint), rel=0.01)
    assert space.total == pytest.approx(3 * space.one + 16 * 26)  # 8 steps of 2 samples
    left = space_needed(config, World(0, 1), alone.model, checkpoint)
    assert (left.one, left.total) == (space.one, space.one + 4 * 26)
    finished = space_needed(config, World(0, 1), alone.model, checkpoint.with_name("step_000008"))
    assert (finished.one, finished.total) == (0, 0)


# ---- going on


def test_resuming_is_never_having_stopped(alone: Run, data: Path, copied: Path, caplog) -> None:
    """From the middle: what the run wrote after the checkpoint is computed again, to the last bit."""
    for name in names(copied / "a")[1:]:
        shutil.rmtree(copied / "a" / "checkpoints" / name)
    with caplog.at_level("INFO"):
        run = start(data, copied, run_name="a", resume=True, keep_checkpoints=3, **FLAGS)
    assert run.status == 0 and same(run, alone)
    assert f"resuming from {copied}/a/checkpoints/step_000003" in caplog.text
    assert names(run.folder) == names(alone.folder)


def test_more_steps(alone: Run, data: Path, copied: Path, tmp_path: Path) -> None:
    """With the learning rates of the longer run: the shorter one must have had its --lr_decay_steps."""
    rarely = FLAGS | {"checkpoint_interval": 100}
    longer = start(data, tmp_path / "b", run_name="a", **rarely | {"max_steps": 10})
    message = refused(data, copied, max_steps=10)
    assert "--lr_decay_steps is 10, was 8" in message and "--max_steps" not in message
    flags = rarely | {"lr_decay_steps": 10}
    start(data, tmp_path / "c", run_name="a", **flags)
    run = start(data, tmp_path / "c", run_name="a", resume=True, **flags | {"max_steps": 10})
    assert run.metrics().train_loss.tolist() == longer.metrics().train_loss.tolist()
    assert same(run, longer)


def refused(data: Path, results: Path, **flags: object) -> str:
    """A run that is refused without a change to what is there. Returns the message."""
    before = tree(results)
    run = start(data, results, **{"run_name": "a", "resume": True} | FLAGS | flags)
    assert tree(results) == before
    assert run.status == 2
    return run.err


def test_another_configuration_is_refused_with_its_differences(data: Path, copied: Path) -> None:
    message = refused(data, copied, learning_rate=0.1, betas="0.5,0.6", eval_interval=4)
    assert (
        "--learning_rate is 0.1, was 0.0006" in message
        and "--betas is [0.5, 0.6], was [0.9, 0.95]" in message
    )
    assert "eval_interval" not in message
    message = refused(data, copied, batch_size=3)
    assert "global batch (processes x --batch_size x --gradient_accumulation_steps) is 3, was 2" in message
    other = write_shards(copied / "other")
    file = next((other / "train").glob("*.json"))
    shard = json.loads(file.read_text())
    file.write_text(json.dumps(shard | {"checksum": shard["checksum"][::-1]}))
    assert "SHA-256 of the shards" in refused(other, copied)


def test_micro_batches_may_change(alone: Run, data: Path, copied: Path) -> None:
    for name in names(copied / "a")[1:]:
        shutil.rmtree(copied / "a" / "checkpoints" / name)
    flags = FLAGS | {"batch_size": 1, "gradient_accumulation_steps": 2}
    run = start(data, copied, run_name="a", resume=True, **flags)
    assert run.status == 0
    assert run.scores().sample_id.tolist() == alone.scores().sample_id.tolist()
    want = alone.scores().dot_product.to_numpy()
    assert run.scores().dot_product.to_numpy() == pytest.approx(want, abs=1e-4 * abs(want).max())


class Wandb:
    """Stands in for wandb: the runs, and of each what it was started with, and what it got for which step. It
    takes no record of an earlier step than the last, which online it remembers by the run's id."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.signature = inspect.signature(wandb.init)
        self.runs: list[Wandb.Run] = []
        monkeypatch.setattr(wandb, "init", self.init)

    def init(self, **given: object) -> "Wandb.Run":
        self.signature.bind(**given)
        before = [run.step for run in self.runs if given["resume"] and run.given["id"] == given["id"]]
        self.runs.append(Wandb.Run(given, before[-1] + 1 if before else 0))
        return self.runs[-1]

    class Run:
        def __init__(self, given: dict[str, Any], step: int) -> None:
            self.given, self.step = given, step
            self.steps: list[tuple[int, bool]] = []

        def __enter__(self) -> "Wandb.Run":
            return self

        def __exit__(self, *error: object) -> None:
            self.finished = True

        def log(self, values: dict[str, float], step: int) -> None:
            assert step >= self.step, "it would be ignored"
            self.step = step
            self.steps.append((step, "loss/val" in values))


def terminate_in_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes as training begins an evaluation."""
    terminate = partial(os.kill, os.getpid(), signal.SIGTERM)
    monkeypatch.setattr("training_loop.evaluate", calling(terminate, evaluation.evaluate))


@pytest.mark.usefixtures("wandb_key")
def test_weights_and_biases_go_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same run, and the evaluation that the first part could not make."""
    fake = Wandb(monkeypatch)
    flags = FLAGS | {"max_steps": 4, "wandb_mode": "online", "wandb_project": "tests"}
    with monkeypatch.context() as patch:
        terminate_in_evaluations(patch)
        assert start(data, tmp_path, run_name="a", **flags).status == 143
    assert start(data, tmp_path, run_name="a", resume=True, **flags).status == 0
    first, second = fake.runs
    assert first.steps == [(0, False), (1, False)]
    assert second.steps == [(2, True), (2, False), (3, False), (3, True)]
    assert first.given["id"] == second.given["id"] == (tmp_path / "a" / "wandb_id").read_text()
    for run in fake.runs:
        assert run.finished and run.given["config"]["max_steps"] == 4
        for name, value in {"resume": "allow", "mode": "online", "project": "tests", "name": "a"}.items():
            assert run.given[name] == value
    start(data, tmp_path, run_name="a", overwrite=True, **flags | {"max_steps": 1, "wandb_mode": "offline"})
    assert fake.runs[2].given["id"] != first.given["id"], "another run"
    assert fake.runs[2].given["resume"] is None and fake.runs[2].given["mode"] == "offline"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"run_name": "b"}, "is not the folder of a run"),
        ({"resume_from": "step_000004"}, "which has step_000003, step_000006, step_000008"),
        ({"max_steps": 5, "lr_decay_steps": 8}, "is beyond --max_steps 5"),
    ],
)
def test_what_is_not_there(flags: dict, said: str, data: Path, copied: Path) -> None:
    assert said in refused(data, copied, **flags)


def test_no_checkpoint_yet(data: Path, copied: Path) -> None:
    shutil.rmtree(copied / "a" / "checkpoints")
    assert "stopped before the first one" in refused(data, copied)


# ---- signals


def signal_in_step(patch: pytest.MonkeyPatch, index: int, number: int) -> None:
    """In the step of this index, counted from where the run begins or goes on."""
    forward_backward, calls = Trainer._forward_backward, iter(range(100))

    def signalled(self, batch):
        losses = forward_backward(self, batch)
        if next(calls) == index:
            os.kill(os.getpid(), number)
        return losses

    patch.setattr(Trainer, "_forward_backward", signalled)


def test_a_batch_job_that_is_requeued(
    alone: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """One command line, and RESULTS_DIR set: the job is killed before its first checkpoint and begins anew. A
    signal comes before there is an optimizer state, after the first step of what was resumed, and in the
    middle. At last the job has nothing left to do."""
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    given = command(data, tmp_path, run_name="night", resume="auto", keep_checkpoints=9, **FLAGS)
    place = given.index("--results_dir")
    flags = [*given[:place], *given[place + 2 :]]
    run = Run(-1, tmp_path / "night", "", "")
    with monkeypatch.context() as patch, one_thread():
        patch.setattr(
            Trainer, "_record", lambda *args: 1 / 0
        )  # an error leaves no checkpoint, as a kill does
        with pytest.raises(ZeroDivisionError):
            main.main(flags)
    assert run.folder.is_dir() and names(run.folder) == []
    for number, index, steps in ((signal.SIGTERM, 0, 0), (signal.SIGINT, 1, 1), (signal.SIGUSR1, 3, 4)):
        with monkeypatch.context() as patch, one_thread():
            signal_in_step(patch, index, number)
            assert main.main(flags) == 128 + number
        assert names(run.folder)[-1] == f"step_{steps:06d}"
        assert f"interrupted after step {steps}: " in caplog.text
    assert "--resume --run_name night resumes it" in caplog.text
    with one_thread():
        assert main.main(flags) == 0
    assert names(run.folder) == [f"step_00000{steps}" for steps in (0, 1, 3, 4, 6, 8)] and same(run, alone)
    before = tree(run.folder / "checkpoints")
    assert main.main(flags) == 0 and tree(run.folder / "checkpoints") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["night", "night.stopped-1"]


def test_an_optimizer_without_a_state(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = FLAGS | {"optimizer": "SGD", "checkpoint_interval": 100}
    whole = start(data, tmp_path / "whole", run_name="a", **flags)
    signal_in_step(monkeypatch, 5, signal.SIGTERM)
    assert start(data, tmp_path, run_name="a", **flags).status == 128 + signal.SIGTERM
    monkeypatch.undo()
    run = start(data, tmp_path, run_name="a", resume=True, **flags)
    assert run.status == 0 and same(run, whole)


def test_sigterm_while_the_state_comes_back(
    alone: Run, data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half there is not saved: the checkpoint stays as it is, and serves again."""
    for name in names(copied / "a")[1:]:
        shutil.rmtree(copied / "a" / "checkpoints" / name)
    for place in ("load_optimizer_state", "set_random_state"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, place, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
            run = start(data, copied, run_name="a", resume=True, **FLAGS)
        assert run.status == 128 + signal.SIGTERM and run.out == ""
        assert names(run.folder) == ["step_000003"]
    run = start(data, copied, run_name="a", resume=True, **FLAGS)
    assert run.status == 0 and same(run, alone)


def test_sigterm_during_an_evaluation(
    alone: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made after the run went on."""
    terminate_in_evaluations(monkeypatch)
    run = start(data, tmp_path, run_name="a", **FLAGS)
    assert (
        run.status == 128 + signal.SIGTERM
        and run.evaluations() == []
        and names(run.folder) == ["step_000002"]
    )
    monkeypatch.undo()
    run = start(data, tmp_path, run_name="a", resume=True, **FLAGS)
    assert run.status == 0
    assert run.evaluations()[0]["step"] == 1
    records = sorted(run.records(), key=lambda record: (record["step"], "loss/val" in record))
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert same(run, alone)


KILLS = {  # plan: where that is
    "start 1 100": "write_text .config.json.tmp",  # no checkpoint yet: it begins anew
    "train 1 3000": "write_table",
    "train 11 9000000": "save_pretrained .step_000006.tmp",
    "drop_rows_from 1 2000": "write_table",
    "keep_records_before 1 200": "write_text .metrics.jsonl.tmp",
    "train 60 before": "",
    "remove_after 8 before": "unlink",  # within rmtree
}


def test_killed_in_the_middle_of_writing(tmp_path: Path) -> None:
    """A few of the kills of benchmarks/kill_and_resume.py, in each of the places where files change."""
    if not (ROOT / "data" / "demo" / ".complete.sha256").exists():
        pytest.skip("the demo shards are not made: ./init.sh")
    plans = iter(KILLS)
    happened, found = compare(tmp_path, len(KILLS), lambda *_: next(plans), max_steps=12)
    assert found == []
    for line, where in zip(happened, KILLS.values(), strict=True):
        assert f"killed in {where}" in line, happened


def test_what_a_killed_run_left_is_removed(data: Path, copied: Path) -> None:
    """At the latest when it goes on, also if nothing is left to do."""
    left = copied / "a" / "checkpoints" / ".step_000006.old.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"large")
    run = start(data, copied, run_name="a", resume=True, **FLAGS)
    assert run.status == 0 and not left.exists() and len(names(run.folder)) == 3


# ---- faults


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, content)


def truncate(path: Path) -> None:
    replace(path, path.read_bytes()[:-1])


def replace(path: Path, content: bytes | bytearray) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["bit flipped", "truncated", "missing"])
def test_a_damaged_checkpoint(damage: Callable[[Path], None], file: str, data: Path, copied: Path) -> None:
    """Named, and not silently passed over."""
    damage(copied / "a" / "checkpoints" / "step_000008" / file)
    message = refused(data, copied, max_steps=9, lr_decay_steps=8)
    assert "step_000008 is damaged" in message and file in message
    assert "--resume_from step_000006 resumes from the one before it" in message


def test_the_one_before_a_damaged_checkpoint_by_name(alone: Run, data: Path, copied: Path) -> None:
    """Of the checkpoints the newest are kept."""
    flip(copied / "a" / "checkpoints" / "step_000008" / "model.safetensors")
    run = start(data, copied, run_name="a", resume_from="step_000006", keep_checkpoints=1, **FLAGS)
    assert run.status == 0 and same(run, alone) and names(run.folder) == ["step_000008"]
    assert read_manifest(copied / "a" / "checkpoints" / "step_000008")["step"] == 8


def full_from_step_6(flags: list[str]) -> int:
    """main(), while no file may grow beyond 20 MB in the second checkpoint."""
    write = checkpoint.write_checkpoint

    def limited(folder, step, *rest):
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, resource.RLIM_INFINITY))
        return write(folder, step, *rest)

    checkpoint.write_checkpoint = limited
    return main.main(flags)


def test_a_full_disk(data: Path, tmp_path: Path) -> None:
    """The first checkpoint stays, and is gone on from."""
    flags = command(data, tmp_path, run_name="a", **FLAGS | {"max_steps": 6, "dot_prod_save_interval": 100})
    said = tmp_path / "said"
    process = fork(full_from_step_6, flags, output=said, environment=environment(tmp_path))
    process.join(60)
    error = Path(f"{said}.err").read_text()
    assert process.exitcode == 2, error
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"main.py: error: cannot write {tmp_path}/a/checkpoints/step_000006: ")
    assert last.endswith("the checkpoints that were there before are whole")
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step_000003"]
    run = start(data, tmp_path, run_name="a", resume=True, **FLAGS | {"max_steps": 6})
    assert run.status == 0 and names(run.folder) == ["step_000003", "step_000006"]


def test_two_runs_in_one_folder(data: Path, tmp_path: Path) -> None:
    flags = command(data, tmp_path, run_name="a", **FLAGS | {"max_steps": 100_000})
    process = fork(main.main, flags, output=tmp_path / "said", environment=environment(tmp_path))
    try:
        deadline = time.monotonic() + 60
        while not names(tmp_path / "a"):
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.05)
        for how in ("resume", "overwrite"):
            run = start(data, tmp_path, run_name="a", **{how: True}, **FLAGS | {"max_steps": 100_000})
            assert run.status == 2 and "another process is at work in" in run.err
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    run = start(data, tmp_path, run_name="a", overwrite=True, **FLAGS)  # the lock went with the process
    assert run.status == 0


# ---- folders that travelled


def copy_without_links(run: Path, target: Path) -> Path:
    """As `cp -rL`, object stores and zip do."""
    return shutil.copytree(run, target)


def test_a_copy_without_symbolic_links(alone: Run, data: Path, copied: Path, tmp_path: Path) -> None:
    """Its model is a folder, which is evaluated, scored, and replaced by the link when the run goes on."""
    copy = copy_without_links(copied / "a", tmp_path / "copies" / "a")
    assert not (copy / "model").is_symlink()
    assert start(data, copy.parent, run_name="a", eval_only=True, **FLAGS).status == 0
    assert ScoredRun.open(copy).granularity == "total"
    (copy / ".model.copy.tmp").mkdir()  # of a run that was killed in the middle of it
    run = start(data, copy.parent, run_name="a", resume_from="step_000006", keep_checkpoints=3, **FLAGS)
    assert run.status == 0 and same(run, alone)  # which sees what is left over, too
    assert os.readlink(copy / "model") == "checkpoints/step_000008"


def put_a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("precious")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: (model / "notes.txt").write_text("precious"), "it has notes.txt, too"),
        (lambda model: flip(model / "model.safetensors"), "the checksum of model.safetensors is not"),
        (lambda model: (model / "manifest.json").unlink(), "it is not whole"),
        (put_a_file, "it is a file"),
    ],
)
def test_a_model_that_is_not_the_runs_is_left(
    damage: Callable[[Path], object], said: str, data: Path, copied: Path
) -> None:
    model = copied / "a" / "model"
    model.unlink()
    shutil.copytree(copied / "a" / "checkpoints" / "step_000008", model)
    damage(model)
    message = refused(data, copied)
    assert f"{model} is neither the link to the newest checkpoint nor a copy" in message and said in message


@pytest.mark.parametrize("text", [None, "checkpoints/step_000008"], ids=["missing", "a file with its text"])
def test_a_link_that_was_lost(text: str | None, data: Path, copied: Path) -> None:
    link = copied / "a" / "model"
    link.unlink()
    if text is not None:
        link.write_text(text)
    run = start(data, copied, run_name="a", eval_only=True, **FLAGS)
    assert run.status == 2
    message = run.err
    assert f"`ln -sfn checkpoints/step_000008 {link}`" in message
    assert start(data, copied, run_name="a", resume=True, **FLAGS).status == 0
    assert os.readlink(link) == "checkpoints/step_000008"


def test_the_link_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before is there, and nothing else."""
    checkpoint_folder = tmp_path / "checkpoints" / "step_000001"
    checkpoint.write_checkpoint(checkpoint_folder.parent, 1, lambda folder: (folder / "x").touch(), {}, 1)
    (tmp_path / "model").unlink()
    shutil.copytree(checkpoint_folder, tmp_path / "model")

    def fail(*_: object) -> None:
        raise IsADirectoryError(21, "Is a directory")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="model: Is a directory"):
        checkpoint.remove_after(checkpoint_folder)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "model"}
    assert (tmp_path / "model" / "x").exists()


def test_parts_that_were_not_copied(data: Path, copied: Path) -> None:
    folder = copied / "a"
    (scores,) = (folder / "grad_dotprods").iterdir()
    pq.write_table(pq.read_table(scores, filters=[("step", "!=", 3)]), scores)
    message = refused(data, copied, max_steps=9, lr_decay_steps=8)
    assert "grad_dotprods has 14 scores" in message and "the run had 16 samples" in message
    shutil.rmtree(folder / "grad_dotprods")
    shutil.rmtree(folder / "validation")
    (folder / "metrics.jsonl").unlink()
    message = refused(data, copied)
    missing = "lacks metrics.jsonl, grad_dotprods, validation/rows.parquet of the steps before step_000008"
    assert missing in message and f"--init_from {folder}/checkpoints/step_000008" in message


@pytest.mark.parametrize(
    "name", ["config.json", "checkpoints", "checkpoints/step_000008/manifest.json", "grad_dotprods/{scores}"]
)
@pytest.mark.parametrize("resume", ["always", "auto"])
def test_what_may_not_be_read(
    name: str, resume: str, data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named as what it is: it may be whole."""
    (scores,) = (copied / "a" / "grad_dotprods").iterdir()
    path = copied / "a" / name.format(scores=scores.name)
    deny(path, monkeypatch)
    message = refused(data, copied, resume=resume)
    assert str(path) in message and "ermission denied" in message
    assert "damaged" not in message and "not the folder of a run" not in message


def deny(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to read a file or a folder: rights are nothing to root, who may run the tests."""

    def denying(function: Callable) -> Callable:
        def called(file: Path, *arguments: object, **more: object) -> object:
            if str(file) == str(path):
                raise PermissionError(13, "Permission denied", str(file))
            return function(file, *arguments, **more)

        return called

    for name in ("open", "iterdir"):
        monkeypatch.setattr(Path, name, denying(getattr(Path, name)))
    monkeypatch.setattr(pq, "read_schema", denying(pq.read_schema))


@pytest.mark.parametrize("line", [b"{\n", b"[1]\n", b'{"loss": 1}\n', b"\0\0\xff\n"])
def test_a_line_of_metrics_that_is_damaged(line: bytes, data: Path, copied: Path) -> None:
    path = copied / "a" / "metrics.jsonl"
    path.write_bytes(line + path.read_bytes())
    assert f"{path}: line 1 is not a record of a step" in refused(data, copied)


def rewrite(checkpoint_folder: Path, *, config: dict | None = None, manifest: dict | None = None) -> None:
    """Other fields in run_config.json and the manifest, "": left out; with the checksums of then."""

    def changed(path: Path, fields: dict) -> dict:
        values = json.loads(path.read_text()) | fields
        return {name: value for name, value in values.items() if value != ""}

    path = checkpoint_folder / "run_config.json"
    path.write_text(json.dumps(changed(path, config or {})))
    values = changed(checkpoint_folder / "manifest.json", manifest or {})
    del values["sha256"]
    size, digest = path.stat().st_size, checkpoint.sha256_of(path)
    values["files"]["run_config.json"] = {"bytes": size, "sha256": digest}
    values["sha256"] = checkpoint._hash_of_manifest(values)
    (checkpoint_folder / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"config": {"direction": ""}}, "is of another version of this program, it lacks direction"),
        ({"config": {"future": 1}}, "it has future, which this version does not know: resume with"),
        ({"manifest": {"evaluation_due": ""}}, "does not say its evaluation_due: another version"),
        ({"manifest": {"SHA-256 of the shards": ""}}, "does not say its SHA-256 of the shards"),
        ({"manifest": {"format": 2}}, "has the format 2, this program reads 1: another version"),
        ({"manifest": {"format": None}}, "has the format None, this program reads 1"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_version(fields: dict, said: str, data: Path, copied: Path) -> None:
    rewrite(copied / "a" / "checkpoints" / "step_000008", **fields)
    assert said in refused(data, copied)


def test_a_setting_that_may_change_may_be_missing(data: Path, copied: Path) -> None:
    rewrite(copied / "a" / "checkpoints" / "step_000008", config={"log_interval": ""})
    assert start(data, copied, run_name="a", resume=True, **FLAGS).status == 0


def test_a_state_of_another_version(alone: Run, tmp_path: Path) -> None:
    torch.save({"optimizer": None, "scaler": {}}, tmp_path / "trainer_state.pt")
    optimizer, scaler = torch.optim.SGD(alone.model.parameters()), torch.amp.GradScaler(enabled=False)
    state = TrainingState(alone.model, alone.model, optimizer, scaler, GhostEngineManager())
    with pytest.raises(
        CheckpointError, match="lacks random, scores, tokens, seconds, evaluation_due, evaluation"
    ):
        state.load(tmp_path)


def test_eval_only_of_another_version(data: Path, copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copied / "a" / "config.json"
    values = json.loads(path.read_text())
    del values["val_set"]
    path.write_text(json.dumps(values))
    with caplog.at_level("INFO"):
        assert start(data, copied, run_name="a", eval_only=True, **FLAGS).status == 0
    assert "val_set is val, was not recorded by the version that made the run" in caplog.text
    del values["architecture"]
    path.write_text(json.dumps(values))
    run = start(data, copied, run_name="a", eval_only=True, **FLAGS)
    assert run.status == 2
    message = run.err
    assert "config.json has no architecture: another version of this program wrote it" in message


def test_the_table_of_a_run_that_is_finished(alone: Run, data: Path, copied: Path) -> None:
    loss = alone.metrics().train_loss.iloc[-1]
    run = start(data, copied, run_name="a", resume=True, **FLAGS)
    assert run.status == 0 and "nan" not in run.out
    assert "steps                  8 of 8, none was left to make\n" in run.out
    assert f"train loss, step 7     {loss:.4f}\n" in run.out
    (copied / "a" / "metrics.jsonl").write_text("")
    run = start(data, copied, run_name="a", resume=True, **FLAGS | {"log_interval": 100})
    assert "train loss, last step  not recorded (--log_interval 100)\n" in run.out


# ---- starting from another model


def pretrained(folder: Path, **given: object) -> Path:
    config = GPT2Config(n_layer=2, n_head=4, n_embd=128, vocab_size=50257, **given)
    torch.manual_seed(9)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_init_from_a_pretrained_gpt2(data: Path, tmp_path: Path, caplog) -> None:
    """With the published vocabulary, activation and dropout, which is set to 0 and said."""
    folder = pretrained(tmp_path / "gpt2")
    with caplog.at_level("INFO"):
        run = start(data, tmp_path, run_name="a", init_from=folder, learning_rate=1e-12, warmup_step=0)
    assert run.status == 0
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        assert f"{name}=0.1 is set to 0" in caplog.text
    want = GPT2LMHeadModel.from_pretrained(folder)
    got = GPT2LMHeadModel.from_pretrained(run.folder / "model")
    assert got.config.vocab_size == 50257 and got.config.activation_function == "gelu_new"
    for mine, other in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)
    assert math.isfinite(run.metrics().train_loss.iloc[-1])
    again = start(
        data, tmp_path, run_name="a", init_from=folder, resume=True, learning_rate=1e-12, warmup_step=0
    )
    assert again.status == 0  # nothing left to do


def test_init_from_another_architecture(data: Path, tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "gpt2")
    run = start(data, tmp_path, run_name="a", init_from=folder, architecture="GPT2-Small")
    assert run.status == 2 and f"--architecture GPT2-Small has n_layer 12, the model in {folder} 2" in run.err
    run = start(data, tmp_path, run_name="a", init_from=tmp_path / "nowhere")
    assert run.status == 2 and "there is no saved model in" in run.err
