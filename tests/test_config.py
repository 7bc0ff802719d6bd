"""The configuration, its command line, and a run's folder."""

import argparse
import ast
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from config_file import ROOT, TrainingConfig, describe, resolve
from foundation.errors import ConfigError, UserError
from foundation.flags import check_flags, flag, flag_parser, flags_of
from foundation.paths import path_argument
from run.folder import check_result_dir, prepare_result_dir, provenance, save, settle_resume

NOON = datetime(2026, 1, 2, 12, 34, 56, 789_000, tzinfo=UTC)
PACKAGES = tuple(path.parent.name for path in ROOT.glob("*/__init__.py"))
SOURCES = [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]


@pytest.fixture
def no_gpu(gpu_is_there: Callable[[bool], None]) -> None:
    gpu_is_there(False)


@pytest.fixture
def gpu(gpu_is_there: Callable[[bool], None]) -> None:
    gpu_is_there(True)


def run_config(tmp_path: Path, *flags: str) -> TrainingConfig:
    return resolve(
        TrainingConfig.from_command_line(["--results_dir", str(tmp_path / "runs"), *flags]), {}, NOON
    )


# ---- the command line


def test_without_flags_the_defaults_of_the_fields_hold() -> None:
    assert TrainingConfig.from_command_line([]) == TrainingConfig()


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--batch_size", "7"], "batch_size", 7),
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--betas", "0.8,0.99"], "betas", (0.8, 0.99)),
        (["--method", "Regular"], "method", "Regular"),
        (["--eval_only"], "eval_only", True),
        (["--no-eval_only"], "eval_only", False),
        (["--eval_bs", "3"], "eval_bs", 3),
        (["--domains", "Wikipedia (en):2,Pile-CC:1"], "domains", "Wikipedia (en):2,Pile-CC:1"),
        (["--min_lr", "0"], "min_lr", 0.0),
        (["--grad_clip=0"], "grad_clip", 0.0),
    ],
)
def test_a_flag_sets_its_field_and_no_other(flags: list[str], field: str, value: object) -> None:
    config = TrainingConfig.from_command_line(flags)
    assert getattr(config, field) == value
    assert replace(config, **{field: getattr(TrainingConfig(), field)}) == TrainingConfig()


def test_the_commands_of_the_docs_are_valid() -> None:
    requeued = "--run_name night --batch_size 8 --resume auto"
    assert requeued in (ROOT / "docs" / "runs.md").read_text()
    for flags in (
        "--batch_size 2 --max_steps 20",
        "--learning_rate 1e-5",
        "--eval_only --run_name a",
        requeued,
    ):
        resolve(TrainingConfig.from_command_line(flags.split()), {}, NOON)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batch_sise 3", "--batch_sise"),
        ("--batch 3", "--batch"),
        ("stray", "stray"),
        ("--batch_size 0", "--batch_size 0: must be at least 1"),
        ("--batch_size 2.5", "--batch_size: invalid int value: '2.5'"),
        ("--batch_size", "--batch_size: expected one argument"),
        ("--val_batch_size -1", "--val_batch_size -1: must be at least 1"),
        ("--max_steps 0", "--max_steps 0"),
        ("--seed -1", "--seed -1"),
        ("--learning_rate 0", "--learning_rate 0.0: must be above 0"),
        ("--learning_rate nan", "--learning_rate nan: must be a finite number"),
        ("--weight_decay inf", "--weight_decay inf"),
        ("--min_lr 1", "--min_lr 1.0 is above --learning_rate 0.0006"),
        ("--betas 0.9", "--betas: invalid list of 2 numbers"),
        ("--betas 0.9,b", "--betas: invalid list of 2 numbers"),
        ("--betas 0.9,1", "--betas 0.9,1.0: both must be below 1"),
        ("--betas=-0.1,0.9", "--betas -0.1: must be at least 0"),
        ("--architecture Pythia-410M", "choose from 'GPT2-Tiny', 'GPT2-Small', 'GPT2-Medium', 'GPT2-Large'"),
        ("--train_dtype float64", "--train_dtype float64 does not go with --model_dtype float32"),
        ("--model_dtype bfloat16 --train_dtype float16", "choose from auto, bfloat16"),
        ("--model_dtype float16", "--model_dtype: invalid choice: 'float16'"),
        ("--val_set val:", "--val_set 'val:': must be SPLIT or SPLIT:DOMAIN,DOMAIN"),
        ("--test_set test:A:2", "--test_set 'test:A:2': only --domains takes weights"),
        ("--train_set train:A,A", "--train_set 'train:A,A': 'A' is named twice"),
        ("--domains A:x", "--domains 'A:x': 'A' has the weight 'x'"),
        ("--train_set ../train", "--train_set '../train'"),
        ("--train_set train:ArXiv --domains Github", "give one"),
        ("--run_name a/b", "--run_name 'a/b'"),
        ("--run_name ..", "--run_name '..'"),
        ("--run_name=", "--run_name '': must not be empty"),
        ("--results_dir=", "--results_dir '': must not be empty"),
        ("--direction gradient --method Regular", "computes no dot products: leave out --direction"),
        ("--audit_interval 5 --method Regular", "computes no dot products: leave out --audit_interval"),
        (
            "--score_granularity token --contraction instantiate",
            "--score_granularity token with --contraction instantiate",
        ),
        ("--contraction gram", "AdamW's direction with --contraction gram: it makes no"),
        ("--compile", "use --direction gradient"),
        (
            "--validation_point lookahead --parallel fsdp",
            "lookahead --val_refresh_interval 1 with --parallel fsdp",
        ),
        ("--val_refresh_interval 4 --compile --optimizer SGD", "--val_refresh_interval 4 with --compile"),
        ("--val_refresh_interval 4 --score_granularity pairwise", "with --score_granularity pairwise"),
        (
            "--exact_by_target",
            "--exact_by_target with --values in_pass: it splits exact values; give --values exact",
        ),
        ("--values exact --parallel fsdp", "--values exact with --parallel fsdp"),
        ("--audit_interval 10 --parallel fsdp", "--audit_interval 10 with --parallel fsdp"),
        ("--audit_interval -1", "--audit_interval -1: must be at least 0"),
        ("--eval_only --overwrite", "--overwrite or --resume with --eval_only"),
        ("--eval_only --resume auto --run_name a", "--overwrite or --resume with --eval_only"),
        ("--resume auto --overwrite --run_name a", "--resume and --overwrite"),
        ("--resume auto", "--resume: which run? give its --run_name"),
        (
            "--resume auto --resume_from step_000001 --run_name a",
            "--resume auto and --resume_from step_000001",
        ),
        ("--resume maybe --run_name a", "--resume: invalid choice: 'maybe'"),
    ],
)
def test_what_is_wrong_ends_the_program_and_is_named(
    flags: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        TrainingConfig.from_command_line(flags.split())
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        ("", "never"),
        ("--resume --batch_size 1", "always"),
        ("--batch_size 1 --resume", "always"),
        ("--resume always", "always"),
        ("--resume=auto", "auto"),
    ],
)
def test_resume_alone_or_with_a_value(flags: str, want: str) -> None:
    assert TrainingConfig.from_command_line([*flags.split(), "--run_name", "a"]).resume == want


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\x1b[2J", "caf\udce9"])
def test_a_run_name_is_printable(name: str) -> None:
    """The third is an escape of the terminal, the last a byte that is no UTF-8."""
    with pytest.raises(ConfigError, match="of printable characters"):
        TrainingConfig(run_name=name)


def test_a_configuration_built_in_code_is_validated_too() -> None:
    with pytest.raises(ConfigError, match="choose from GPT2-Tiny, GPT2-Small, GPT2-Medium, GPT2-Large"):
        TrainingConfig(architecture="Pythia")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--batch_size 0"):
        replace(TrainingConfig(), batch_size=0)


def test_a_new_option_is_one_new_field() -> None:
    @dataclass(frozen=True)
    class Later(TrainingConfig):
        ghosts: int = flag(1, "100 % new", at_least=1)
        spirit: str | None = flag(None, "a name")

    parser = flag_parser(Later, "main.py", "")
    config = Later(**vars(parser.parse_args(["--ghosts", "4", "--spirit", "a"])))
    assert (config.ghosts, config.spirit) == (4, "a")
    assert "100 % new [1]" in parser.format_help()
    assert "ghosts 4" in re.sub(" +", " ", describe(config))
    with pytest.raises(ConfigError, match="--ghosts 0"):
        check_flags(Later(ghosts=0))


def test_help_has_every_flag_and_every_default() -> None:
    text = flag_parser(TrainingConfig, "main.py", "").format_help()
    for spec in flags_of(TrainingConfig):
        assert f"--{spec.name}" in text
        assert spec.metadata["doc"]
        if spec.default is None:
            assert re.search(r"\[.+\]$", spec.metadata["doc"]), f"{spec.name}: what is None resolved to?"
    assert "[0.9,0.95]" in text


# ---- resolving


def test_nothing_is_left_open(no_gpu: None) -> None:
    config = resolve(TrainingConfig(), {}, NOON)
    assert {spec.name for spec in flags_of(config) if getattr(config, spec.name) is None} == {
        "domains",
        "init_from",
        "resume_from",
    }
    assert config.device == "cpu" and config.train_dtype == "float32"
    assert config.min_lr == pytest.approx(6e-5) and config.lr_decay_steps == 1000 and config.eval_bs == 2
    assert config.pile_data_dir == str(ROOT / "data" / "demo")
    assert config.result_dir == ROOT / "results" / "GradDotProd-GPT2-Small-bs2-20260102T123456.789Z"
    assert set(config.resolved_from) == {
        "device", "train_dtype", "min_lr", "lr_decay_steps", "eval_bs", "pile_data_dir", "llava_data_dir",
        "results_dir", "run_name", "audit_interval",
    }  # fmt: skip
    assert config.resolved_from["eval_bs"] == "batch_size"
    assert config.resolved_from["pile_data_dir"] == "default"


def test_what_was_given_stays_and_is_not_called_resolved(no_gpu: None, tmp_path: Path) -> None:
    given = TrainingConfig(
        device="cpu", train_dtype="bfloat16", min_lr=0.0, lr_decay_steps=700, eval_bs=5, run_name="auto",
        architecture="auto", init_from=str(tmp_path), pile_data_dir=str(tmp_path), llava_data_dir=str(tmp_path),
        results_dir=str(tmp_path), audit_interval=7,
    )  # fmt: skip
    resolved = resolve(given, {"PILE_DATA_DIR": "/elsewhere", "RESULTS_DIR": ""})
    assert resolved == given
    assert resolved.resolved_from == {}


def test_resolving_twice_changes_nothing(no_gpu: None) -> None:
    once = resolve(TrainingConfig(), {}, NOON)
    twice = resolve(once, {"PILE_DATA_DIR": "/elsewhere"})
    assert twice == once and twice.resolved_from == once.resolved_from


@pytest.mark.parametrize(
    ("model_dtype", "on_cpu", "on_gpu"),
    [
        ("float32", "float32", "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float64", "float64", "float64"),
    ],
)
def test_train_dtype_auto(model_dtype: str, on_cpu: str, on_gpu: str, gpu: None) -> None:
    config = TrainingConfig(model_dtype=model_dtype)  # type: ignore[arg-type]
    assert resolve(replace(config, device="cpu"), {}).train_dtype == on_cpu
    assert resolve(config, {}).device == "cuda"
    assert resolve(config, {}).train_dtype == on_gpu


def test_cuda_without_a_gpu_is_an_error(no_gpu: None) -> None:
    with pytest.raises(ConfigError, match=r"--device cuda.*sees no GPU.*--device cpu"):
        resolve(TrainingConfig(device="cuda"), {})


def test_folders_flag_before_environment_before_default(no_gpu: None, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"PILE_DATA_DIR": "shards", "RESULTS_DIR": "/results"}
    config = resolve(TrainingConfig(results_dir="mine"), environ)
    assert config.pile_data_dir == str(tmp_path / "shards")
    assert config.results_dir == str(tmp_path / "mine")
    assert config.resolved_from["pile_data_dir"] == "environment variable PILE_DATA_DIR"
    assert "results_dir" not in config.resolved_from
    with pytest.raises(ConfigError, match="RESULTS_DIR is empty"):
        resolve(TrainingConfig(), {"RESULTS_DIR": ""})


def test_what_the_sets_are_made_of() -> None:
    config = TrainingConfig(val_set="val:PubMed Abstracts,ArXiv", domains="ArXiv:2,Pile-CC:1")
    chosen = config.selections()
    assert (chosen["train"].split, chosen["train"].domains) == ("train", ("ArXiv", "Pile-CC"))
    assert chosen["train"].weights == {"ArXiv": 2, "Pile-CC": 1}
    assert (chosen["val"].split, chosen["val"].domains) == ("val", ("PubMed Abstracts", "ArXiv"))
    assert (chosen["test"].split, chosen["test"].domains) == ("test", None)
    assert {selection.flag for selection in chosen.values()} == {"--domains", "--val_set", "--test_set"}


def test_the_home_folder_is_expanded(no_gpu: None, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = resolve(TrainingConfig(results_dir="~/x", init_from="~/model"), {"PILE_DATA_DIR": "~/data"})
    assert config.results_dir == f"{tmp_path}/x" and config.pile_data_dir == f"{tmp_path}/data"
    assert config.init_from == f"{tmp_path}/model"
    config = resolve(TrainingConfig(pile_data_dir="~", init_from="a/~"), {"RESULTS_DIR": "~root/runs"})
    assert config.pile_data_dir == str(tmp_path) and config.init_from == "a/~"
    assert config.results_dir == os.path.expanduser("~root/runs")
    monkeypatch.chdir(tmp_path)
    assert resolve(TrainingConfig(results_dir="./~"), {}).results_dir == f"{tmp_path}/~"


@pytest.mark.parametrize(
    ("given", "environ", "where"),
    [
        ({"results_dir": "~nobody-here"}, {}, "--results_dir ~nobody-here"),
        ({"pile_data_dir": "~nobody-here/a"}, {}, "--pile_data_dir ~nobody-here/a"),
        ({"init_from": "~nobody-here/a"}, {}, "--init_from ~nobody-here/a"),
        ({}, {"RESULTS_DIR": "~nobody-here/a"}, "RESULTS_DIR ~nobody-here/a"),
        ({}, {"PILE_DATA_DIR": "~nobody-here/a"}, "PILE_DATA_DIR ~nobody-here/a"),
    ],
)
def test_the_home_folder_of_nobody(given: dict, environ: dict[str, str], where: str) -> None:
    with pytest.raises(UserError, match=f"^{where}: there is no home folder for ~nobody-here"):
        resolve(TrainingConfig(**given), environ)


def test_paths_of_the_commands_are_expanded_in_one_place(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=path_argument)
    assert parser.parse_args(["--output=~/a"]).output == tmp_path / "a"
    with pytest.raises(argparse.ArgumentTypeError, match="~nobody-here: there is no home folder"):
        path_argument("~nobody-here")
    commands = [*SOURCES, *ROOT.glob("benchmarks/*.py")]
    types = {
        keyword.value.id
        for path in commands
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "type" and isinstance(keyword.value, ast.Name)
    }
    assert "path_argument" in types and "Path" not in types


def test_describe_shows_every_field_and_where_it_came_from(no_gpu: None) -> None:
    text = re.sub(" +", " ", describe(resolve(TrainingConfig(), {}, NOON)))
    assert text.count("\n") == len(flags_of(TrainingConfig)) - 1
    assert "device cpu (auto)" in text and "learning_rate 0.0006\n" in text


# ---- the folder of a run


def prepare(config: TrainingConfig) -> None:
    """Makes the folder, and lets go of it at once."""
    with ExitStack() as resources:
        prepare_result_dir(config, resources)


def test_config_json_has_every_field_as_resolved_and_the_provenance(tmp_path: Path) -> None:
    config = run_config(tmp_path, "--betas", "0.8,0.9", "--device", "cpu")
    prepare(config)
    save(config, config.result_dir / "config.json", provenance(tmp_path) | {"strategies": {"h.0": "gram"}})
    values = json.loads((config.result_dir / "config.json").read_text())
    assert {spec.name for spec in fields(TrainingConfig)} < values.keys()
    assert values["train_dtype"] == "float32" and values["betas"] == [0.8, 0.9]
    assert values["resolved_from"]["train_dtype"] == "auto" and "device" not in values["resolved_from"]
    assert values["python"] == ".".join(map(str, sys.version_info[:3]))
    assert values["packages"]["torch"] == metadata.version("torch")
    assert values["strategies"] == {"h.0": "gram"}
    assert sorted(path.name for path in config.result_dir.iterdir()) == [".lock", "config.json"]


def test_extra_values_cannot_hide_a_field(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        save(run_config(tmp_path), tmp_path / "config.json", {"seed": 1})


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_git_commit(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance(tmp_path)["git_commit"] is None
    assert "no git commit: fatal: not a git repository" in caplog.text

    git(tmp_path, "init")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "a")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert provenance(tmp_path)["git_commit"] == commit
    (tmp_path / "file").write_text("b")
    assert provenance(tmp_path)["git_commit"] == commit + "-dirty"

    monkeypatch.setenv("PATH", "")
    assert provenance(tmp_path)["git_commit"] is None
    assert "git is not installed" in caplog.text


def test_a_named_run_that_exists_is_an_error_and_stays(tmp_path: Path) -> None:
    config = run_config(tmp_path, "--run_name", "a")
    prepare(config)
    (config.result_dir / "scores").write_text("precious")
    with pytest.raises(ConfigError, match=r"--run_name a: .* is there already.*--overwrite"):
        prepare(config)
    assert (config.result_dir / "scores").read_text() == "precious"


def make_run(config: TrainingConfig) -> None:
    prepare(config)
    save(config, config.result_dir / "config.json", {})
    (config.result_dir / "model").mkdir()
    (config.result_dir / "model" / "weights").write_text("old")


def test_overwrite_replaces_a_run(tmp_path: Path) -> None:
    config = run_config(tmp_path, "--run_name", "a", "--overwrite")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    make_run(config)
    (config.result_dir / "link").symlink_to(outside)
    prepare(config)
    assert [path.name for path in config.result_dir.iterdir()] == [".lock"]
    assert (outside / "file").read_text() == "precious"


def test_overwrite_of_a_run_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path, "--run_name", "a", "--overwrite")
    make_run(config)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    prepare(config)
    assert [path.name for path in config.result_dir.iterdir()] == [".lock"]


def raising(error: BaseException):
    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.mark.parametrize("content", ["", "not json", "[1]", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_overwrite_leaves_what_is_not_a_run(tmp_path: Path, content: str) -> None:
    """A saved model's folder, say, has a config.json of its own."""
    config = run_config(tmp_path, "--run_name", "a", "--overwrite")
    config.result_dir.mkdir(parents=True)
    (config.result_dir / "thesis.tex").write_text("precious")
    if content:
        (config.result_dir / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"--overwrite: .* is not the folder of a run"):
        prepare(config)
    assert (config.result_dir / "thesis.tex").read_text() == "precious"


def test_overwrite_does_not_follow_a_link_or_remove_a_file(tmp_path: Path) -> None:
    make_run(run_config(tmp_path, "--run_name", "real"))
    config = run_config(tmp_path, "--run_name", "a", "--overwrite")
    config.result_dir.symlink_to(tmp_path / "runs" / "real")
    with pytest.raises(ConfigError, match="not the folder of a run"):
        prepare(config)
    config.result_dir.unlink()
    config.result_dir.write_text("precious")
    with pytest.raises(ConfigError, match="not the folder of a run"):
        prepare(config)
    assert config.result_dir.read_text() == "precious"


def test_overwrite_takes_an_empty_folder(tmp_path: Path) -> None:
    """Left by a run that was killed before it wrote its config.json."""
    config = run_config(tmp_path, "--run_name", "a", "--overwrite")
    prepare(config)
    prepare(config)


AUTO = ("--run_name", "a", "--resume", "auto")


def test_resume_auto_begins_where_there_is_no_run(tmp_path: Path) -> None:
    """Or no more of one than a kill at once left."""
    config = run_config(tmp_path, *AUTO)
    assert not settle_resume(config).resumes
    prepare(config)
    prepare(config)
    assert [path.name for path in config.result_dir.parent.iterdir()] == ["a"]


def test_resume_auto_sets_a_run_without_a_checkpoint_aside(tmp_path: Path) -> None:
    config = run_config(tmp_path, *AUTO)
    for number in (1, 2):
        make_run(config)
        (config.result_dir / "scores").write_text(f"of part {number}")
        assert settle_resume(config) is config
    prepare(config)
    for number in (1, 2):
        assert (tmp_path / "runs" / f"a.stopped-{number}" / "scores").read_text() == f"of part {number}"
    assert [path.name for path in config.result_dir.iterdir()] == [".lock"]


def test_resume_auto_goes_on_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    config = run_config(tmp_path, *AUTO)
    make_run(config)
    (config.result_dir / "checkpoints" / "step_000003").mkdir(parents=True)
    settled = settle_resume(config)
    assert settled.resumes and settled.resolved_from["resume"] == "auto: the run has a checkpoint"
    with pytest.raises(ConfigError, match="has got a checkpoint from another process"):
        prepare(config)  # which was settled before there was one
    assert (config.result_dir / "checkpoints" / "step_000003").is_dir()


def test_resume_auto_leaves_what_is_not_a_run(tmp_path: Path) -> None:
    config = run_config(tmp_path, *AUTO)
    config.result_dir.mkdir(parents=True)
    (config.result_dir / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"--resume auto: .* is not the folder of a run"):
        check_result_dir(config)


def test_a_results_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"--results_dir .*cannot make .*RESULTS_DIR"):
        prepare(run_config(tmp_path))


def test_a_read_only_results_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path)
    monkeypatch.setattr(Path, "mkdir", raising(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(ConfigError, match=r"cannot make .* \(Permission denied\)"):
        prepare(config)


def test_eval_only_makes_nothing_and_knows_its_model(tmp_path: Path) -> None:
    fresh = run_config(tmp_path, "--eval_only")
    prepare(fresh)
    assert fresh.saved_model is None
    assert not (tmp_path / "runs").exists()

    named = run_config(tmp_path, "--eval_only", "--run_name", "a")
    with pytest.raises(ConfigError, match=r"--eval_only --run_name a: .* is not the folder of a run"):
        prepare(named)
    assert not (tmp_path / "runs").exists()

    make_run(run_config(tmp_path, "--run_name", "a"))
    prepare(named)
    assert named.saved_model == tmp_path / "runs" / "a" / "model"
    with pytest.raises(ConfigError, match="give --architecture GPT2-Small"):
        prepare(replace(named, architecture="GPT2-Tiny"))


# ---- the rest of the project


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def reads(tree: ast.AST, names: tuple[str, ...]) -> set[str]:
    """Attributes read of a variable or an attribute of one of these names: config.seed, self.config.seed."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", None)
            if name in names:
                found.add(node.attr)
    return found


# What reads fields of TrainingConfig for the program.
PROPERTIES = (
    "result_dir", "folder", "strategy", "computes_scores", "saved_model", "resumes", "selections",
)  # fmt: skip


def test_no_field_is_dead() -> None:
    """Every field is read where the program runs: validating, resolving and saving it is not a use of it."""
    used = set().union(
        *(reads(parse(path), ("config",)) for path in SOURCES if path.name != "config_file.py")
    )
    for node in ast.walk(parse(ROOT / "config_file.py")):
        if isinstance(node, ast.FunctionDef) and node.name in PROPERTIES and node.name in used:
            used |= reads(node, ("self",))
    dead = {spec.name for spec in flags_of(TrainingConfig)} - used
    assert not dead, f"no program reads these fields of TrainingConfig: {', '.join(sorted(dead))}"


def imported(paths: Iterable[Path]) -> set[str]:
    """Packages that are not of the project or the standard library."""
    names = set()
    for path in paths:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
                names.add(node.module.partition(".")[0])
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "optional"
                and isinstance(node.args[0], ast.Constant)
            ):
                names.add(str(node.args[0].value).partition(".")[0])
    names = {"pillow" if name == "PIL" else name for name in names}
    own = {path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"))}
    standard = sys.stdlib_module_names | {"compression"}  # which is new in Python 3.14
    return names - own - {*PACKAGES, "benchmarks", "examples"} - standard


def required(name: str) -> set[str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("-r ")]
    assert all(re.search(r"==|>=.*,<", line) for line in lines), "every requirement is bounded"
    return {re.split(r"[.=<>]", line)[0] for line in lines}


def test_requirements_are_what_the_code_imports() -> None:
    """An integration is for those who have its library."""
    integrations = [path for path in SOURCES if ROOT / "ghostEngines" / "integrations" in path.parents]
    assert imported(set(SOURCES) - set(integrations)) == required("requirements.txt")
    folders = ("tests", "benchmarks", "examples")
    beside = [*integrations, *(path for name in folders for path in (ROOT / name).glob("*.py"))]
    assert imported(beside) <= required("requirements.txt") | required("requirements-dev.txt")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"architecture": "LLaVA-Tiny", "pile_data_dir": "a"}, "--pile_data_dir"),
        ({"llava_data_dir": "a"}, "--llava_data_dir"), ({"tokenizer": "gpt2"}, "--tokenizer"),
        ({"on_bad_record": "skip"}, "--on_bad_record"),
    ],
)  # fmt: skip
def test_a_flag_that_would_do_nothing_is_an_error(flags: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} with --architecture .* leave {name} out"):
        TrainingConfig(**flags)
