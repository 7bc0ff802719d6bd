"""How a run ends when it cannot go on: what was asked is wrong, the loss is not finite, an error, Ctrl-C."""

import errno
import fcntl
import json
import math
import os
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import wandb
from run_helpers import ROOT, Run, calling, command, environment, python, start, tree
from transformers import GPT2LMHeadModel

import evaluation
import main
import model_setup
from benchmarks.launch import fork
from config_file import TrainingConfig, resolve
from data_processing.shards import GPT2_BYTES_IDS, ShardWriter
from foundation.errors import UserError
from ghostEngines import GradDotProdEngine
from ghostEngines.engine_manager import GradDotProdManager
from models import gpt2
from models.causal_lm import CausalLM
from run.log import RunLog
from run.signals import SIGNALS, drop_closed_outputs, interrupt_deferred, stop_signals
from score_store.writer import ScoreWriter
from training_loop import Trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder of results with one run, named "there"."""
    results = tmp_path_factory.mktemp("results")
    assert start(data, results, run_name="there", max_steps=1).status == 0
    return results


# ---- bad input


def refusal(arguments: list[str], results: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What main() says to a command line that is wrong; it leaves the results as they are."""
    before = tree(results.parent)
    status: object
    try:
        status = main.main(arguments)
    except SystemExit as exit:  # argparse's way
        status = exit.code
    assert status == 2
    assert tree(results.parent) == before
    out, err = capsys.readouterr()
    errors = err.split("main.py: error: ")
    assert out == "" and len(errors) == 2 and "Traceback" not in err
    assert errors[0] in ("", "usage: main.py [--flag value ...]  (--help lists the flags)\n")
    return errors[1].rstrip("\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"batch_sise": 2}, "unrecognized arguments: --batch_sise 2"),
        ({"method": "Shapley"}, "argument --method: invalid choice: 'Shapley'"),
        ({"architecture": "Pythia-410M"}, "'GPT2-Tiny', 'GPT2-Small', 'GPT2-Medium', 'GPT2-Large'"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"block_size": 1100}, "--block_size 1100 is longer than the 1024 positions of GPT2-Tiny"),
        ({"val_batch_size": 10_000}, "--val_batch_size 10000: there are "),
        ({"domains": "Gamma"}, "--domains 'Gamma': no Gamma in {data}/train; choose from Alpha, Beta [b]"),
        ({"domains": "Alpha:0"}, "'Alpha' has the weight '0', not a finite one above 0"),
        (
            {"val_set": "val:Gamma"},
            "--val_set 'val:Gamma': no Gamma in {data}/val; choose from Alpha, Beta [b]",
        ),
        ({"test_set": "exam"}, "no shards of split 'exam' in {data} (splits there: test, train, val)"),
        ({"pile_data_dir": "/nowhere"}, "no shards of split 'train' in /nowhere"),
        ({"run_name": "there", "eval_only": True}, "results/there is not the folder of a run"),
        ({"run_name": "x" * 300}, "(File name too long); name a folder that can be written"),
        ({"run_name": "x" * 300, "resume": "auto"}, "(File name too long); name a folder that can be"),
        ({"results_dir": "/dev/null/runs"}, "--results_dir /dev/null/runs: cannot make /dev/null/runs/"),
        (
            {"results_dir": "~nobody-here/runs"},
            "--results_dir ~nobody-here/runs: there is no home folder for",
        ),
        (
            {"wandb_mode": "offline", "wandb_project": "a/b"},
            "--wandb_project a/b: Invalid project name 'a/b'",
        ),
        ({"wandb_mode": "offline", "wandb_project": "x" * 129}, "exceeded 128 characters"),
        (
            {"wandb_mode": "offline", "run_name": "x" * 129},
            "has 129 characters, and Weights & Biases takes 128",
        ),
    ],
)
def test_wrong_flags(
    flags: dict[str, object], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(command(data, tmp_path / "results", **flags), tmp_path / "results", capsys)
    assert said.format(data=data) in message
    assert "\n" not in message or "Make them with\n  python -m data_processing.tokenize_pile" in message


def test_a_block_longer_than_a_shard(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = shutil.copytree(data, tmp_path / "shards")
    with ShardWriter(shards / "val", "Short", split="val", ids=GPT2_BYTES_IDS) as shard:
        shard.append([1, 2, 3])
    flags = command(shards, tmp_path / "results", val_set="val:Short")
    message = refusal(flags, tmp_path / "results", capsys)
    assert "--val_set 'val:Short': a block is 9 tokens" in message and "Short (4 tokens)" in message


def test_a_file_system_without_locks(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is found before the run's folder, or that of all runs, is made."""

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = refusal(command(data, tmp_path / "a" / "results"), tmp_path / "a" / "results", capsys)
    assert message.startswith(f"{tmp_path}/a/results/GradDotProd-")
    assert ": its file system has no locks (No locks available)" in message and "--results_dir" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("wandb_key")
@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        (
            "login",
            wandb.errors.AuthenticationError("the key is\n not good"),
            "the key is not good; set WANDB_A",
        ),
        ("setup", ValueError("base_url: no URL"), "base_url: no URL; correct its WANDB_... variable"),
    ],
)
def test_what_weights_and_biases_refuses(
    where: str, error: Exception, said: str, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse() -> None:
        raise error

    monkeypatch.setattr(wandb, where, refuse)
    message = refusal(command(data, tmp_path / "results", wandb_mode="online"), tmp_path / "results", capsys)
    assert message.startswith("--wandb_mode online: ") and said in message and "\n" not in message


def truncate(folder: Path) -> None:
    file = folder / "Alpha.bin"
    file.write_bytes(file.read_bytes()[:-2])


def change(**fields: object) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        file = folder / "Alpha.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return rewrite


def put_foreign_tokens(folder: Path) -> None:
    file = folder / "Alpha.bin"
    tokens = np.fromfile(file, "<u2")
    tokens[:-1] = 60_000
    tokens.tofile(file)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "Alpha.bin: has "),
        (lambda folder: (folder / "Alpha.bin").unlink(), "Alpha.json: its Alpha.bin is missing"),
        (lambda folder: (folder / "Alpha.json").unlink(), "Alpha.bin: has no Alpha.json beside it"),
        (lambda folder: (folder / "Alpha.bin").write_bytes(b""), "Alpha.bin: has 0 bytes, its JSON says"),
        (lambda folder: (folder / "Alpha.json").write_text("{}"), "Alpha.json: is not the JSON of a shard"),
        (lambda folder: (folder / "Alpha.json").write_text("{"), "Alpha.json: is not the JSON of a shard"),
        (change(format_version=9), "Alpha.json: has format version 9"),
        (change(num_tokens=10), "Alpha.bin: has "),
        (change(max_token_id=60_000), "largest token id 60000 is beyond the vocabulary of 50257 ids"),
        (
            change(tokenizer="gpt2"),
            "{folder}: Alpha.json has tokenizer 'gpt2', Beta %5Bb%5D.json 'gpt2_bytes'",
        ),
        (put_foreign_tokens, "token id 60000 in block "),
    ],
)
def test_damaged_shards(
    damage: Callable[[Path], None], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the validation split, whose rows are read before anything is written."""
    shards = shutil.copytree(data, tmp_path / "shards")
    damage(shards / "val")
    flags = {"val_set": "val:Alpha"} if damage is put_foreign_tokens else {}
    message = refusal(command(shards, tmp_path / "results", **flags), tmp_path / "results", capsys)
    assert said.format(folder=shards / "val") in message and "\n" not in message


def test_splits_of_different_tokenizers(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = shutil.copytree(data, tmp_path / "shards")
    for file in (shards / "test").glob("*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer": "gpt2"}))
    message = refusal(command(shards, tmp_path / "results"), tmp_path / "results", capsys)
    assert "different tokenizers" in message and "'test': 'gpt2'" in message


def test_an_id_beyond_the_models_vocabulary(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt2, "VOCABULARY", 50256)
    message = refusal(command(data, tmp_path / "results"), tmp_path / "results", capsys)
    assert message.startswith("the train shards have token id 50256, the model's vocabulary ends at 50255")


def test_no_gpu(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gpu_is_there: Callable[[bool], None]
) -> None:
    gpu_is_there(False)
    message = refusal(command(data, tmp_path / "results", device="cuda"), tmp_path / "results", capsys)
    assert message.startswith("--device cuda: ")


def test_results_where_a_file_is(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").write_text("precious")
    message = refusal(command(data, tmp_path / "results"), tmp_path / "results", capsys)
    assert message.startswith(f"--results_dir {tmp_path}/results: cannot make ")
    assert (tmp_path / "results").read_text() == "precious"


def test_a_run_that_is_there(data: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(command(data, saved, run_name="there"), saved, capsys)
    assert "--overwrite" in message and str(saved / "there") in message


def test_overwrite_replaces_a_run(data: Path, saved: Path, tmp_path: Path) -> None:
    results = shutil.copytree(saved, tmp_path / "results")
    run = start(data, results, run_name="there", overwrite=True, max_steps=2, method="Regular")
    assert run.status == 0 and len(run.metrics()) == 2 and not (run.folder / "grad_dotprods").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: (model / "model.safetensors").write_bytes(b"short"), "model.safetensors is damaged"),
        (lambda model: (model / "model.safetensors").unlink(), "has no weights"),
        (lambda model: (model / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda model: shutil.rmtree(model), "there is no saved model in "),
    ],
)
def test_a_damaged_saved_model(
    damage: Callable[[Path], None], said: str, data: Path, saved: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    results = shutil.copytree(saved, tmp_path / "results")
    damage(results / "there" / "model")
    message = refusal(command(data, results, run_name="there", eval_only=True), results, capsys)
    assert said in message and str(results / "there" / "model") in message


def test_a_saved_model_with_dropout(
    data: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = shutil.copytree(saved, tmp_path / "results")
    file = results / "there" / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_pdrop": 0.1}))
    message = refusal(command(data, results, run_name="there", eval_only=True), results, capsys)
    assert "attn_pdrop=0.1" in message


def test_one_of_several_processes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refusal(command(data, tmp_path / "results"), tmp_path / "results", capsys)
    assert message.startswith("WORLD_SIZE is set, but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT")


@pytest.mark.parametrize("flags", [{"batch_size": 0}, {}])
def test_what_a_launcher_left_behind_hides_no_message(
    flags: dict[str, int], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LOCAL_RANK", "1")
    message = refusal(command(data, tmp_path / "results", **flags), tmp_path / "results", capsys)
    assert message.startswith("--batch_size 0" if flags else "LOCAL_RANK is set, but not RANK, WORLD_SIZE")


@pytest.mark.parametrize("task", ["0", "1"])
def test_tasks_that_do_not_know_of_each_other(
    task: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `srun --ntasks 4 python main.py`: the first says so, for all."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", task)
    assert main.main(command(data, tmp_path / "results")) == 2
    assert not (tmp_path / "results").exists()
    said = capsys.readouterr().err
    assert said.startswith("main.py: error: 4 tasks of this program were started") == (task == "0")
    assert (said == "") == (task != "0")


# ---- a loss or a gradient that is not finite, and errors


def meddle(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable) -> list[dict]:
    """From its forward pass number `at` on, with gradients, the model's losses go through `action`. Returns
    a list that gets the parameters of then. Without the guard, which calls the model as well."""
    build = GradDotProdEngine.__init__

    def unguarded(self, *args, **options):
        build(self, *args, **options | {"guard": False})

    monkeypatch.setattr(GradDotProdEngine, "__init__", unguarded)
    forward = CausalLM.forward
    seen: list[dict] = []
    calls = iter(range(1_000_000))

    def meddled(self, x, y):
        losses = forward(self, x, y)
        if not torch.is_grad_enabled() or next(calls) < at:
            return losses
        seen.append({name: parameter.detach().clone() for name, parameter in self.hf.named_parameters()})
        return action(losses)

    monkeypatch.setattr(CausalLM, "forward", meddled)
    return seen


def steps_scored(run: Run) -> list[int]:
    """The steps on the disk, after a look at each being whole."""
    scores = run.scores()
    assert (scores.groupby("step").size() == 2).all()
    return scores.step.unique().tolist()


def saved_is(run: Run, parameters: dict[str, torch.Tensor]) -> bool:
    model = GPT2LMHeadModel.from_pretrained(run.folder / "model")
    return all(torch.equal(model.get_parameter(name), want) for name, want in parameters.items())


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(
    value: float, row: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Row 2 is the validation row: the training loss is finite."""
    poison = torch.tensor([value if index == row else 0.0 for index in range(3)])
    seen = meddle(monkeypatch, 3, lambda losses: losses + poison)
    run = start(data, tmp_path, run_name="a", max_steps=6)
    assert run.status == 1
    assert steps_scored(run) == [0, 1, 2] and run.metrics().step.tolist() == [0, 1, 2]
    assert saved_is(run, seen[0])
    monkeypatch.undo()
    clean = start(data, tmp_path, run_name="b", max_steps=6)
    ids = clean.scores().query("step == 3").sample_id.tolist()
    assert "step 3: the loss is not finite" in caplog.text and str(value) in caplog.text
    assert f"samples {ids}" in caplog.text
    assert "steps                  3 of 6" in run.out


@pytest.mark.usefixtures("waits_to_log")
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("method", ["GradDotProd", "Regular"])
def test_a_loss_that_nobody_looks_at_in_its_step(
    method: str, optimizer: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """As on a GPU, which is waited for in every fifth step only: step 1 fails, steps 2 to 4 change nothing
    any more and have no scores."""
    failing = iter([False, True, *[False] * 10])
    seen = meddle(monkeypatch, 0, lambda losses: losses + math.nan if next(failing) else losses)
    run = start(data, tmp_path, run_name="a", max_steps=9, log_interval=5, method=method, optimizer=optimizer)
    assert run.status == 1 and len(seen) == 5
    assert not torch.equal(seen[0]["transformer.wpe.weight"], seen[1]["transformer.wpe.weight"])
    assert saved_is(run, seen[1])
    assert "step 1: the loss is not finite" in caplog.text and "steps                  1 of 9" in run.out
    if method == "GradDotProd":
        scores = run.scores()
        assert scores[scores.value.notna()].step.unique().tolist() == [0]
        assert set(scores[scores.value.isna()].step) == {1, 2, 3}


def test_a_gradient_that_is_not_finite_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def poison(losses: torch.Tensor) -> torch.Tensor:
        losses.register_hook(lambda gradient: gradient * math.inf)
        return losses

    seen = meddle(monkeypatch, 2, poison)
    run = start(data, tmp_path, run_name="a", method="Regular")
    assert run.status == 1 and len(run.metrics()) == 2
    assert "step 2: the norm of the gradient is" in caplog.text
    assert saved_is(run, seen[0])


def test_a_dot_product_that_is_not_finite_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dot_products = GradDotProdEngine.dot_products
    monkeypatch.setattr(
        GradDotProdEngine,
        "dot_products",
        lambda engine: dot_products(engine).masked_fill(torch.tensor([True, False]), math.inf),
    )
    run = start(data, tmp_path, run_name="a")
    assert run.status == 1
    assert "step 0: a dot product with the validation gradient is not finite" in caplog.text


@pytest.mark.parametrize("eval_only", [False, True])
def test_an_evaluation_that_is_not_finite(
    eval_only: bool, data: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    forward = CausalLM.forward
    monkeypatch.setattr(
        CausalLM,
        "forward",
        lambda *args: forward(*args) * (1 if torch.is_grad_enabled() else math.nan),
    )
    if eval_only:
        assert start(data, saved, run_name="there", eval_only=True).status == 1
    else:
        run = start(data, tmp_path, run_name="a", eval_interval=3, max_steps=6)
        assert run.status == 1 and steps_scored(run) == [0, 1, 2]
        assert not (run.folder / "checkpoints").exists(), (
            "parameters of no use are no checkpoint to go on from"
        )
    assert "the loss on train is nan" in caplog.text


class Broken(Exception):
    pass


def test_an_error_in_a_step_comes_out_as_itself(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(losses: torch.Tensor) -> None:
        raise Broken

    meddle(monkeypatch, 3, fail)
    with pytest.raises(Broken):
        start(data, tmp_path, run_name="a", dot_prod_save_interval=100)
    run = Run(1, tmp_path / "a", "", "")
    assert steps_scored(run) == [0, 1, 2]
    assert not (run.folder / "model").exists(), (
        "a model in the middle of an update is not saved as a good one"
    )


# ---- Ctrl-C and other signals


def interrupt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupting(original: Callable, when: int = 0, after: bool = False) -> Callable:
    """The function, with an interrupt before (or after) its call number `when`."""
    calls = iter(range(1_000_000))

    def interrupted(*args, **kwargs):
        now = next(calls) == when
        if now and not after:
            interrupt()
        result = original(*args, **kwargs)
        if now and after:
            interrupt()
        return result

    return interrupted


def parameters_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in run.model.hf.named_parameters()}


def test_ctrl_c_in_a_forward_pass(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = meddle(monkeypatch, 3, calling(interrupt, lambda losses: losses))
    run = start(data, tmp_path, run_name="a", dot_prod_save_interval=100)
    assert run.status == 130
    assert steps_scored(run) == [0, 1, 2] and saved_is(run, seen[0])
    assert "steps                  3 of 4" in run.out
    assert "loss on val            not evaluated yet" in run.out


@pytest.mark.parametrize("where", [(torch.optim.AdamW, "step"), (Trainer, "_record")])
def test_ctrl_c_in_an_update_waits_for_its_end(
    where: tuple[type, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*where, interrupting(getattr(*where), 2))
    run = start(data, tmp_path, run_name="a", dot_prod_save_interval=100)
    assert run.status == 130
    assert steps_scored(run) == [0, 1, 2] == run.metrics().step.tolist()
    assert saved_is(run, parameters_of(run))


def test_ctrl_c_in_an_evaluation(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_loop.evaluate", interrupting(evaluation.evaluate))
    run = start(data, tmp_path, run_name="a", eval_interval=3, dot_prod_save_interval=100)
    assert run.status == 130
    assert steps_scored(run) == [0, 1, 2] and run.evaluations() == []
    assert saved_is(run, parameters_of(run))


@pytest.mark.parametrize(("where", "when"), [("attach", 1), ("detach", 0)])
def test_ctrl_c_while_the_engine_is_put_back_or_taken_off(
    where: str, when: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an evaluation. What is not attached could not be detached at the end."""
    original = getattr(GradDotProdEngine, where)
    evaluated: list[int] = []
    monkeypatch.setattr(GradDotProdEngine, where, interrupting(original, when, after=where == "detach"))
    noted = calling(lambda: evaluated.append(1), evaluation.evaluate)
    monkeypatch.setattr("training_loop.evaluate", noted)
    run = start(data, tmp_path, run_name="a", eval_interval=3, dot_prod_save_interval=100)
    assert run.status == 130
    assert steps_scored(run) == [0, 1, 2] and saved_is(run, parameters_of(run))
    assert bool(evaluated) == (where == "attach"), "after detach, no time goes into an evaluation"


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    """As one that a script starts in the background."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt_deferred() as interruptible:
            interrupt()
            with interruptible():
                interrupt()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_noted(number: signal.Signals) -> None:
    with stop_signals(wait=True) as stop:
        os.kill(os.getpid(), number)
        assert stop.received == number


@pytest.mark.parametrize("read", [True, False])
def test_outputs_that_nobody_reads_go_nowhere(read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of `main.py | tee log`, where the closing terminal ended both."""
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "__stdout__", stream)
        monkeypatch.setattr(sys, "__stderr__", None)
        if not read:
            os.close(reader)
        drop_closed_outputs()
        stream.write("said")
    if read:
        assert os.read(reader, 9) == b"said"
        os.close(reader)


def in_terminal(terminal: str, flags: list[str]) -> int:
    """main() as the first process of a terminal."""
    os.setsid()
    for stream in range(3):
        os.dup2(os.open(terminal, os.O_RDWR), stream)
    return main.main(flags)


def test_a_terminal_that_is_closed(data: Path, tmp_path: Path) -> None:
    """The run ends with a checkpoint, and with SIGHUP's status, although there is nothing to print to."""
    keyboard, terminal = os.openpty()
    flags = command(data, tmp_path, run_name="a", max_steps=100_000)
    process = fork(
        in_terminal, os.ttyname(terminal), flags, output=tmp_path / "said", environment=environment(tmp_path)
    )
    run = Run(-1, tmp_path / "a", "", "")

    def is_alive() -> bool:
        while select.select([keyboard], [], [], 0)[0]:
            os.read(keyboard, 65536)  # else it would wait to print
        return process.is_alive()

    wait_for_lines(run, 3, is_alive)
    os.close(terminal)
    os.close(keyboard)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGHUP
    steps = steps_scored(run)
    assert (run.folder / "model").resolve().name == f"step_{len(steps):06d}"
    assert run.metrics().step.tolist() == steps == list(range(len(steps)))


@pytest.mark.parametrize("interrupted", [True, False])
def test_ctrl_c_while_saving_does_not_break_what_is_saved(
    interrupted: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one, after that which ended the run, or a first one after the last step."""
    if interrupted:
        meddle(monkeypatch, 3, calling(interrupt, lambda losses: losses))
    close = GradDotProdManager.close
    monkeypatch.setattr(GradDotProdManager, "close", interrupting(close))
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", interrupting(GPT2LMHeadModel.save_pretrained))
    run = start(data, tmp_path, run_name="a", dot_prod_save_interval=100)
    assert run.status == 130
    assert steps_scored(run) == [0, 1, 2, 3][: 3 if interrupted else 4]
    assert saved_is(run, parameters_of(run))
    assert not (run.folder / ".model.tmp").exists()


def test_the_model_is_saved_although_the_scores_cannot_be(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(ScoreWriter, "close", full)
    with pytest.raises(OSError, match="no space left"):
        start(data, tmp_path, run_name="a", max_steps=1)
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "a" / "model")


def test_a_record_that_finds_no_room(tmp_path: Path) -> None:
    """Nothing of it is left that would be tried, and fail, again when the log is closed."""
    config = resolve(TrainingConfig(results_dir=str(tmp_path), run_name="a"))
    config.result_dir.mkdir()
    (config.result_dir / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left"), RunLog(config, 0, False) as log:
        log.record(0, {"loss": 1.0})


def test_ctrl_c_before_the_first_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a program, since there is nothing to save and main() lets it through."""
    monkeypatch.setattr(model_setup, "build_model", interrupting(model_setup.build_model))
    monkeypatch.setattr(sys, "argv", ["main.py", *command(data, tmp_path / "results")])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as exit:
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
    assert isinstance(exit.value, SystemExit) and exit.value.code == 130
    assert not (tmp_path / "results").exists()


def wait_for_lines(run: Run, count: int, is_alive: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while lines(run) < count:
        assert is_alive() and time.monotonic() < end, "the run does not get there"
        time.sleep(0.02)


def lines(run: Run) -> int:
    file = run.folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_a_process_that_is_interrupted(data: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 100_000, "dot_prod_save_interval": 100_000, "eval_interval": 2}
    arguments = python("main.py", *command(data, tmp_path, run_name="a", **flags))
    pipe = subprocess.PIPE
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(tmp_path), stdout=pipe, stderr=pipe)
    run = Run(-1, tmp_path / "a", "", "")
    wait_for_lines(run, 3, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    out, err = (text.decode().replace("\r", "\n") for text in process.communicate(timeout=60))
    assert process.returncode == 130, err
    steps = run.metrics().step.tolist()
    assert steps_scored(run) == steps == list(range(len(steps)))
    assert len(run.scores()) == 2 * len(steps)
    assert GPT2LMHeadModel.from_pretrained(run.folder / "model").config.n_embd == 128
    assert "Traceback" not in err and "Warning" not in err
    assert f"interrupted after step {len(steps)}: " in err
    logged = re.findall(
        r"^after step (\d+): loss train \d+\.\d{4}, val \d+\.\d{4}, test \d+\.\d{4}$", err, re.MULTILINE
    )
    assert [int(step) for step in logged] == [record["step"] for record in run.evaluations()] != []
    done_and_left = rf"{len(steps)}/100000 \[\d\d:\d\d<[\d:]+, +[\d.]+(step/s|s/step)"
    assert re.search(done_and_left + r", loss \d+\.\d{4}, \d+ tokens/s\]", err)
    assert f"steps                  {len(steps)} of 100000" in out


def test_a_process_that_is_killed_keeps_what_was_written(data: Path, tmp_path: Path) -> None:
    flags = command(data, tmp_path, run_name="a", max_steps=100_000, dot_prod_save_interval=2)
    process = fork(main.main, flags, output=tmp_path / "said", environment=environment(tmp_path))
    run = Run(-1, tmp_path / "a", "", "")
    wait_for_lines(run, 6, process.is_alive)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    steps = steps_scored(run)
    assert steps == list(range(len(steps))) and len(steps) % 2 == 0
    assert len(steps) >= lines(run) - 2 >= 4
    assert pd.read_parquet(run.folder / "validation").shape[0] == 1
