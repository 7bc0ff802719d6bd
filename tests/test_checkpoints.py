"""Checkpoints: a run that is stopped in any way goes on as if it had not been."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_helpers import ROOT, Run, command, environment, python, start, tree, write_shards
from transformers import GPT2Config, GPT2LMHeadModel

import training_loop
from benchmarks.kill_and_resume import compare, differences
from checkpoint import list_checkpoints, read_manifest
from training_loop import Trainer

FLAGS = {"max_steps": 8, "checkpoint_interval": 3, "eval_interval": 2, "dot_prod_save_interval": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Left alone; --keep_checkpoints 3 keeps all."""
    run = start(data, tmp_path_factory.mktemp("alone"), run_name="a", keep_checkpoints=3, **FLAGS)
    assert run.status == 0
    return run


@pytest.fixture
def copied(alone: Run, tmp_path: Path) -> Path:
    """Results with a copy of that run, at its end."""
    shutil.copytree(alone.folder, tmp_path / "a", symlinks=True)
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


def test_the_newest_are_kept(data: Path, tmp_path: Path) -> None:
    run = start(data, tmp_path, run_name="a", keep_checkpoints=1, **FLAGS)
    assert names(run.folder) == ["step_000008"]
    assert not list((run.folder / "checkpoints").glob(".*"))


# ---- going on


@pytest.mark.parametrize("steps", [3, 6])
def test_resuming_is_never_having_stopped(steps: int, alone: Run, data: Path, copied: Path, caplog) -> None:
    """From the middle: what the run wrote after the checkpoint is computed again, to the last bit."""
    for name in names(copied / "a"):
        if int(name[5:]) > steps:
            shutil.rmtree(copied / "a" / "checkpoints" / name)
    with caplog.at_level("INFO"):
        run = start(data, copied, run_name="a", resume=True, keep_checkpoints=3, **FLAGS)
    assert run.status == 0 and same(run, alone)
    assert f"resuming from {copied}/a/checkpoints/step_00000{steps}" in caplog.text
    assert names(run.folder) == names(alone.folder)


def test_more_steps(alone: Run, data: Path, copied: Path, tmp_path: Path) -> None:
    """With the learning rates of the longer run: the shorter one must have had its --lr_decay_steps."""
    longer = start(data, tmp_path / "b", run_name="a", **FLAGS | {"max_steps": 10})
    message = refused(data, copied, max_steps=10)
    assert "--lr_decay_steps is 10, was 8" in message and "--max_steps" not in message
    flags = FLAGS | {"lr_decay_steps": 10}
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_in_a_step(
    number: signal.Signals, alone: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    forward_backward, calls = Trainer._forward_backward, iter(range(100))

    def signalled(self, batch):
        losses = forward_backward(self, batch)
        if next(calls) == 4:
            os.kill(os.getpid(), number)
        return losses

    monkeypatch.setattr(Trainer, "_forward_backward", signalled)
    run = start(data, tmp_path, run_name="a", keep_checkpoints=9, **FLAGS)
    assert run.status == 128 + number
    assert names(run.folder) == ["step_000003", "step_000004"]
    assert "--resume --run_name a" in caplog.text
    monkeypatch.undo()
    run = start(data, tmp_path, run_name="a", resume=True, **FLAGS)
    assert run.status == 0 and same(run, alone)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("at", [0, 5])
def test_stopped_before_there_is_an_optimizer_state(
    optimizer: str, at: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first step; and SGD has none at any time."""
    flags = FLAGS | {"optimizer": optimizer}
    whole = start(data, tmp_path / "whole", run_name="a", **flags)
    forward_backward, calls = Trainer._forward_backward, iter(range(100))

    def signalled(self, batch):
        losses = forward_backward(self, batch)
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    monkeypatch.setattr(Trainer, "_forward_backward", signalled)
    assert start(data, tmp_path, run_name="a", **flags).status == 128 + signal.SIGTERM
    monkeypatch.undo()
    run = start(data, tmp_path, run_name="a", resume=True, **flags)
    assert run.status == 0 and same(run, whole)


def test_sigterm_during_an_evaluation(
    alone: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made after the run went on."""
    evaluate = training_loop.evaluate
    monkeypatch.setattr(
        training_loop, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or evaluate(*args)
    )
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


def test_kill_9(tmp_path: Path) -> None:
    """A few of the kills of benchmarks/kill_and_resume.py."""
    if not (ROOT / "data" / "demo" / ".complete.sha256").exists():
        pytest.skip("the demo shards are not made: ./init.sh")
    happened, found = compare(tmp_path, 3, seed=5, max_steps=12)
    assert len(happened) == 3 and found == []


# ---- faults


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["bit flipped", "truncated", "missing"])
def test_a_damaged_checkpoint(damage: Callable[[Path], None], file: str, data: Path, copied: Path) -> None:
    """Named, and not silently passed over."""
    damage(copied / "a" / "checkpoints" / "step_000008" / file)
    message = refused(data, copied, max_steps=9, lr_decay_steps=8)
    assert "step_000008 is damaged" in message and file in message
    assert "--resume_from step_000006 goes on from the one before it" in message


def test_the_one_before_a_damaged_checkpoint_by_name(alone: Run, data: Path, copied: Path) -> None:
    flip(copied / "a" / "checkpoints" / "step_000008" / "model.safetensors")
    run = start(data, copied, run_name="a", resume_from="step_000006", **FLAGS)
    assert run.status == 0 and same(run, alone)
    assert read_manifest(copied / "a" / "checkpoints" / "step_000008")["step"] == 8


def test_a_full_disk(data: Path, tmp_path: Path) -> None:
    """No file may grow beyond 20 MB in the second checkpoint: the first one stays, and is gone on from."""
    flags = command(data, tmp_path, run_name="a", **FLAGS | {"max_steps": 6, "dot_prod_save_interval": 100})
    limited = subprocess.run(
        python("-c", FULL, *flags), cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    )
    assert limited.returncode == 1, limited.stderr
    last = limited.stderr.strip().splitlines()[-1]
    assert last.startswith(f"OSError: cannot write {tmp_path}/a/checkpoints/step_000006: ")
    assert last.endswith("the checkpoints that were there before are whole")
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step_000003"]
    run = start(data, tmp_path, run_name="a", resume=True, **FLAGS | {"max_steps": 6})
    assert run.status == 0 and names(run.folder) == ["step_000003", "step_000006"]


FULL = """
import resource, sys
import checkpoint, main
publish = checkpoint.publish
def limited(folder, step, *rest):
    if step == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, resource.RLIM_INFINITY))
    return publish(folder, step, *rest)
checkpoint.publish = limited
sys.exit(main.main(sys.argv[1:]))
"""


def test_two_runs_in_one_folder(data: Path, tmp_path: Path) -> None:
    flags = command(data, tmp_path, run_name="a", **FLAGS | {"max_steps": 100_000})
    process = subprocess.Popen(
        python("main.py", *flags), cwd=ROOT, env=environment(tmp_path), stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not names(tmp_path / "a"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        for how in ("resume", "overwrite"):
            run = start(data, tmp_path, run_name="a", **{how: True}, **FLAGS | {"max_steps": 100_000})
            assert run.status == 2 and "another process is at work in" in run.err
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    run = start(data, tmp_path, run_name="a", overwrite=True, **FLAGS)  # the lock went with the process
    assert run.status == 0


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
    assert (
        run.status == 2 and "--architecture GPT2-Small has n_layer 12, the model in the folder 2" in run.err
    )
    run = start(data, tmp_path, run_name="a", init_from=tmp_path / "nowhere")
    assert run.status == 2 and "there is no saved model in" in run.err
