"""What a run needs of a file system is tried before it trains."""

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_helpers import start, tree

from foundation.errors import ConfigError
from run.file_system import Space, check_file_system

GB = 1_000_000_000


def failing(number: int):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


LACKS = [
    (os, "symlink", errno.EPERM, "no symbolic links (Operation not permitted)"),
    (os, "symlink", errno.ENOTSUP, "no symbolic links (Operation not supported)"),
    (fcntl, "flock", errno.ENOLCK, "no locks (No locks available)"),
    (os, "replace", errno.EACCES, "cannot be written (Permission denied)"),
    (os, "replace", errno.ENOSYS, "no renaming of a file over another (Function not implemented)"),
    (os, "rename", errno.ENOSYS, "no renaming of folders (Function not implemented)"),
]


@pytest.mark.parametrize(("owner", "name", "number", "said"), LACKS)
def test_what_the_file_system_lacks(
    owner: object, name: str, number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, failing(number))
    with pytest.raises(ConfigError) as error:
        check_file_system(tmp_path, Space())
    assert (
        said in str(error.value) and "--results_dir" in str(error.value) and str(tmp_path) in str(error.value)
    )
    assert list(tmp_path.iterdir()) == []


def test_locks_that_keep_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(ConfigError, match="a second lock was granted"):
        check_file_system(tmp_path, Space())


def test_a_run_on_a_file_system_without_links(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left behind, trained or removed."""
    results = tmp_path / "new" / "results"
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", failing(errno.EPERM))
        run = start(data, results, run_name="a", max_steps=1)
    assert run.status == 2 and "Traceback" not in run.err
    assert run.err.splitlines()[-1].startswith(
        f"main.py: error: {results}/a: its file system has no symbolic links"
    )
    assert list(tmp_path.iterdir()) == []
    assert start(data, results, run_name="a", max_steps=1).status == 0
    before = tree(results / "a")
    monkeypatch.setattr(os, "symlink", failing(errno.EPERM))
    for how in ("overwrite", "resume"):
        run = start(data, results, run_name="a", max_steps=2, lr_decay_steps=1, **{how: True})
        assert run.status == 2 and "no symbolic links" in run.err and tree(results / "a") == before


def disk(monkeypatch: pytest.MonkeyPatch, *, free: int, total: int = 100 * GB) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=total))


def test_room_for_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error if not one fits, a warning if not all do, nothing if the file system does not know."""
    space = Space(one=2 * GB, total=6 * GB)
    disk(monkeypatch, free=GB)
    with pytest.raises(ConfigError, match="1 GB are free, and one checkpoint takes 2 GB: make room"):
        check_file_system(tmp_path, space)
    check_file_system(tmp_path, Space())  # nothing will be written
    assert not caplog.records
    check_file_system(tmp_path, space, freed=GB)
    assert "2 GB are free, and this run will write about 6 GB (2 GB a checkpoint)" in caplog.text
    caplog.clear()
    disk(monkeypatch, free=6 * GB)
    check_file_system(tmp_path, space)
    disk(monkeypatch, free=0, total=0)
    check_file_system(tmp_path, space)
    assert not caplog.records
