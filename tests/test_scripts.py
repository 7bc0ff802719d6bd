"""The shell scripts, in a copy of the project, with a stand-in for Python that notes what it is asked."""

import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = (
    "init.sh",
    "Scripts/train.sh",
    "Scripts/test.sh",
    ".ci/run",
    "requirements.txt",
    "requirements-dev.txt",
)
INSTALL = "-m pip install --disable-pip-version-check -r requirements.txt"
INSTALL_DEV = "-m pip install --disable-pip-version-check -r requirements-dev.txt"
MAKE_DEMOS = [
    "-m data_processing.demo_corpus --output_dir data/demo",
    "-m data_processing.demo_corpus --output_dir data/demo_bpe --vocabulary 4096",
    "-m data_processing.llava_demo --output_dir data/llava_demo",
]

# Notes folder, variables and arguments of each call in $CALLS; fails at $BREAK, waits at $SLOW.
PYTHON = r"""#!/usr/bin/env bash
if [[ $1 == --version ]]; then echo "Python ${VERSION:-3.11.9}"; exit; fi
if [[ $1 == -c ]]; then [[ -z ${VERSION:-} ]]; exit; fi
if [[ "$*" == "-m pip --version" ]]; then exit; fi
note="$PWD|${PILE_SAMPLE_DIR:-}|${TIKTOKEN_CACHE_DIR:-}|$*"
echo "$note" >>"$CALLS"
[[ -z ${BREAK:-} || "$*" != *"$BREAK"* ]] || exit 7
[[ -z ${SLOW:-} || "$*" != *"$SLOW"* ]] || sleep 20
if [[ "$*" == "-m venv .venv" ]]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; fi
if [[ $2 == data_processing.* ]]; then mkdir -p "$4"; fi
if [[ $1 == */main.py ]]; then printf '<%s>' "$@"; exit "${STATUS:-0}"; fi
"""


class Checkout:
    """A copy of the scripts in a folder whose name has spaces, and the calls they made."""

    def __init__(self, base: Path) -> None:
        self.root = base / "a b" / "check out"
        for name in FILES:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "data_processing").mkdir()
        (self.root / "data_processing" / "demo_corpus.py").write_text("# a stand-in\n")
        self.log = base / "calls"
        self.python = base / "bin with space" / "python"
        self.python.parent.mkdir()
        self.python.write_text(PYTHON)
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def command(self, script: str, *arguments: str, cwd: Path | None = None, **environ: str) -> dict:
        """Keyword arguments of subprocess.run and Popen."""
        inherited = {"PATH": os.environ["PATH"], "PYTHON": str(self.python), "CALLS": str(self.log)}
        return {
            "args": [str(self.root / script), *arguments],
            "cwd": cwd or self.root,
            "env": inherited | environ,
            "text": True,
        }

    def run(self, script: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run(capture_output=True, **self.command(script, *arguments, **options))

    def calls(self) -> list[str]:
        """The arguments of each call since the last time."""
        return [line.split("|")[3] for line in self.lines()]

    def lines(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_init_does_everything_once_and_then_nothing_in_no_time(checkout: Checkout) -> None:
    assert checkout.run("init.sh").returncode == 0
    assert checkout.calls() == ["-m venv .venv", INSTALL, *MAKE_DEMOS]
    start = time.perf_counter()
    assert checkout.run("init.sh").returncode == 0
    assert time.perf_counter() - start < 2
    assert checkout.calls() == []


@pytest.mark.parametrize(
    ("changed", "calls"),
    [("requirements.txt", [INSTALL]), ("data_processing/demo_corpus.py", MAKE_DEMOS)],
)
def test_init_does_again_what_has_changed(checkout: Checkout, changed: str, calls: list[str]) -> None:
    checkout.run("init.sh")
    checkout.calls()
    with (checkout.root / changed).open("a") as file:
        file.write("# changed\n")
    assert checkout.run("init.sh").returncode == 0
    assert checkout.calls() == calls


def test_init_dev_includes_the_rest(checkout: Checkout) -> None:
    checkout.run("init.sh")
    checkout.calls()
    assert checkout.run("init.sh", "--dev").returncode == 0
    assert checkout.calls() == [INSTALL_DEV]
    assert checkout.run("init.sh", "--dev").returncode == checkout.run("init.sh").returncode == 0
    assert checkout.calls() == []


@pytest.mark.parametrize(("broken", "again"), [("venv", 0), ("pip install", 1), ("output_dir data/demo", 2)])
def test_init_stops_at_a_failure_and_goes_on_from_there(checkout: Checkout, broken: str, again: int) -> None:
    whole = ["-m venv .venv", INSTALL, *MAKE_DEMOS]
    assert checkout.run("init.sh", BREAK=broken).returncode != 0
    assert checkout.calls() == whole[: again + 1]
    assert checkout.run("init.sh").returncode == 0
    assert checkout.calls() == whole[again:]


def test_init_installs_again_after_a_failure_even_if_the_requirements_are_the_old_ones(
    checkout: Checkout,
) -> None:
    """The failed installation may have replaced some packages already."""
    checkout.run("init.sh")
    requirements = checkout.root / "requirements.txt"
    old = requirements.read_text()
    requirements.write_text("numpy\n")
    assert checkout.run("init.sh", BREAK="pip install").returncode != 0
    requirements.write_text(old)
    checkout.calls()
    assert checkout.run("init.sh").returncode == 0
    assert checkout.calls() == [INSTALL]


@pytest.mark.parametrize(("slow", "again"), [("pip install", 1), ("output_dir data/demo", 2)])
def test_init_survives_kill_9(checkout: Checkout, slow: str, again: int) -> None:
    process = subprocess.Popen(**checkout.command("init.sh", SLOW=slow), start_new_session=True)
    wait_for(lambda: checkout.log.exists() and slow in checkout.log.read_text())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    checkout.calls()
    assert checkout.run("init.sh").returncode == 0
    assert checkout.calls() == ["-m venv .venv", INSTALL, *MAKE_DEMOS][again:]


def test_two_at_once_install_once(checkout: Checkout) -> None:
    processes = [subprocess.Popen(**checkout.command("init.sh"), stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert checkout.calls() == ["-m venv .venv", INSTALL, *MAKE_DEMOS]


def test_a_venv_made_by_hand_is_used(checkout: Checkout) -> None:
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout.python, checkout.root / ".venv" / "bin" / "python")
    assert checkout.run("init.sh").returncode == 0
    assert checkout.calls() == [INSTALL, *MAKE_DEMOS]


def test_init_names_an_old_python_and_the_way_out(checkout: Checkout) -> None:
    result = checkout.run("init.sh", VERSION="3.9.2")
    assert result.returncode == 1
    assert "Python 3.9.2" in result.stderr and "3.11 or newer" in result.stderr and "PYTHON=" in result.stderr
    assert checkout.run("init.sh", PYTHON="no-such-python").returncode == 1
    assert checkout.calls() == []


def test_init_takes_no_unknown_option(checkout: Checkout) -> None:
    result = checkout.run("init.sh", "--developer")
    assert result.returncode == 2 and "--developer" in result.stderr
    assert checkout.calls() == []


def test_train_passes_flags_folder_and_status_through(checkout: Checkout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    flags = ["--domains", "Wikipedia (en):2,Pile-CC:1", "--run_name", "", "--domains=*"]
    result = checkout.run("Scripts/train.sh", *flags, cwd=elsewhere, STATUS="130")
    assert result.returncode == 130
    expected = "".join(f"<{argument}>" for argument in [checkout.root / "main.py", *flags])
    assert result.stdout.endswith(expected)
    assert checkout.lines()[-1].startswith(f"{elsewhere}|")


def test_train_stops_where_the_environment_cannot_be_made(checkout: Checkout) -> None:
    assert checkout.run("Scripts/train.sh", BREAK="pip install").returncode == 7
    assert checkout.calls() == ["-m venv .venv", INSTALL]


@pytest.mark.parametrize(
    ("script", "last"),
    [("init.sh", MAKE_DEMOS[-1]), ("Scripts/train.sh", "{root}/main.py"), ("Scripts/test.sh", "-m pytest")],
)
def test_scripts_work_through_a_link(checkout: Checkout, tmp_path: Path, script: str, last: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(checkout.root / script)
    command = checkout.command(script, cwd=tmp_path) | {"args": [str(link)]}
    assert subprocess.run(**command).returncode == 0
    assert checkout.calls()[-1] == last.format(root=checkout.root)


def test_test_checks_lint_types_and_tests(checkout: Checkout, tmp_path: Path) -> None:
    assert checkout.run("Scripts/test.sh", "-k", "a or b", cwd=tmp_path).returncode == 0
    *_, last = lines = checkout.lines()
    assert [line.split("|")[3] for line in lines][-4:] == [
        "-m ruff check",
        "-m ruff format --check",
        "-m mypy",
        "-m pytest -k a or b",
    ]
    assert last.startswith(f"{checkout.root}|")


@pytest.mark.parametrize("broken", ["ruff check", "ruff format", "mypy", "pytest"])
def test_test_fails_at_the_first_failure(checkout: Checkout, broken: str) -> None:
    assert checkout.run("Scripts/test.sh", BREAK=broken).returncode == 7
    assert broken in checkout.calls()[-1]


def test_ci_names_the_sample_data_where_it_is_there(checkout: Checkout) -> None:
    assert checkout.run(".ci/run").returncode == 0
    assert checkout.lines()[-1] == f"{checkout.root}|||-m pytest"
    (place,) = re.findall(r"-d (\S+)", (ROOT / ".ci" / "run").read_text())
    data = (checkout.root / place).resolve()
    data.mkdir(parents=True)
    assert checkout.run(".ci/run").returncode == 0
    assert checkout.lines()[-1] == f"{checkout.root}|{data}|{data / 'tiktoken_cache'}|-m pytest"


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".txt")])
def test_scripts_can_be_run(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


SIGNALS = ["--signals_to_handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"]


@pytest.mark.parametrize(
    ("given", "launcher"),
    [
        ("", None),
        ("--batch_size 2", None),
        ("--nproc_per_node 4 --batch_size 2", ["--nproc_per_node", "4", "--standalone", *SIGNALS]),
        ("--batch_size 2 --nproc-per-node=4", ["--nproc-per-node=4", "--standalone", *SIGNALS]),
        (
            "--nnodes 2 --node_rank 1 --master_addr a --batch_size 2 --master_port 1",
            ["--nnodes", "2", "--node_rank", "1", "--master_addr", "a", "--master_port", "1", *SIGNALS],
        ),
        (
            "--nproc_per_node 2 --shutdown_timeout 9 --signals_to_handle SIGTERM",
            [
                "--nproc_per_node",
                "2",
                "--shutdown_timeout",
                "9",
                "--signals_to_handle",
                "SIGTERM",
                "--standalone",
            ],
        ),
    ],
)
def test_train_sh_divides_its_flags(given: str, launcher: list[str] | None, tmp_path: Path) -> None:
    """torchrun's go to torchrun, all others to main.py."""
    done = subprocess.run([train_sh(tmp_path), *given.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = ["--batch_size", "2"] if "--batch_size 2" in given else []
    run = [] if launcher is None else ["-m", "torch.distributed.run", *launcher]
    assert done.stdout.splitlines() == [*run, f"{tmp_path}/main.py", *flags]


def train_sh(folder: Path) -> Path:
    """The script, with a Python that prints what it gets."""
    for name, text in (
        ("Scripts/train.sh", (ROOT / "Scripts" / "train.sh").read_text()),
        ("init.sh", "#!/bin/bash\n"),
        (".venv/bin/python", "#!/bin/bash\nprintf '%s\\n' \"$@\"\n"),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return folder / "Scripts" / "train.sh"


@pytest.mark.parametrize(
    ("before", "left"),
    [
        (["nohup"], "SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2"),
        (["sh", "-c", 'trap "" INT QUIT USR2; exec "$@"', "sh"], "SIGTERM,SIGHUP,SIGUSR1"),
    ],
    ids=["nohup", "background"],
)
def test_torchrun_does_not_handle_what_is_ignored(before: list[str], left: str, tmp_path: Path) -> None:
    """It would end the run that nohup protects when the terminal is closed."""
    command = [*before, str(train_sh(tmp_path)), "--nproc_per_node", "2"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = done.stdout.splitlines()
    assert lines[lines.index("--signals_to_handle") + 1] == left


def test_train_sh_names_a_flag_without_its_value() -> None:
    done = subprocess.run([ROOT / "Scripts" / "train.sh", "--nproc_per_node"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "train.sh: error: --nproc_per_node needs a value\n"
