"""Command lines whose values begin with a dash."""

import re
from pathlib import Path
from typing import Any

import pytest

from config_file import TrainingConfig
from foundation.arguments import ArgumentParser


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser("command", allow_abbrev=False)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--text")
    parser.add_argument("--steps", default=":")
    parser.add_argument("--number", type=int)
    parser.add_argument("--quiet", action="store_true")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--sample")
    return parser


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["run", "--text", "-O2", "--quiet"], {"folders": ["run"], "text": "-O2", "quiet": True}),
        (["--text", "--foo", "run"], {"folders": ["run"], "text": "--foo"}),
        (["--text", "---", "--steps", "-1:2"], {"text": "---", "steps": "-1:2"}),
        (["--text", "--foo=--steps", "run"], {"folders": ["run"], "text": "--foo=--steps"}),
        (["--text=--steps", "--steps=3:4"], {"text": "--steps", "steps": "3:4"}),
        (["--text", "a=b", "--sample", "-x:3"], {"text": "a=b", "sample": "-x:3"}),
        (["--text", "", "--number", "-3"], {"text": "", "number": -3}),
        (["--text=", "--", "--steps", "-x"], {"text": "", "folders": ["--steps", "-x"]}),
    ],
)
def test_what_follows_a_flag_is_its_value(parser: ArgumentParser, arguments: list[str], want: dict) -> None:
    nothing: dict[str, Any] = {
        "folders": [],
        "text": None,
        "steps": ":",
        "number": None,
        "quiet": False,
        "sample": None,
    }
    assert vars(parser.parse_args(arguments)) == nothing | want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--text", "--steps", "3:4"],
            "--text: expected one argument; if --steps is meant .* --text=--steps$",
        ),
        (["--text", "--steps=3"], "--text: expected one argument; .* --text=--steps=3$"),
        (["--text", "-h"], "--text: expected one argument; .* --text=-h$"),
        (["run", "--text"], "--text: expected one argument$"),
        (["--text", "--"], "--text: cannot be '--'$"),
        (["--text=--"], "--text: cannot be '--'$"),
        (["--number", "-x"], "--number: invalid int value: '-x'"),
        (["--tex", "-O2"], "unrecognized arguments: --tex"),
        (["-run"], r"-run: is no flag; if that file or folder is meant, give \./-run$"),
    ],
)
def test_what_is_missing_is_said_with_the_remedy(
    parser: ArgumentParser,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-run").mkdir()
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.strip())


def test_the_training_command_has_this_parser() -> None:
    assert TrainingConfig.from_command_line(["--run_name", "-O2"]).run_name == "-O2"
