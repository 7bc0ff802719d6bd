"""What a run tells: JSON lines in its folder, Weights & Biases, a progress bar and one line per evaluation on
the screen."""

import json
import logging
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tqdm.contrib.logging import logging_redirect_tqdm

from foundation.errors import ConfigError, UserError, file_errors
from foundation.files import sync, write_text
from foundation.progress import progress_bar
from run.checkpoint import read_manifest, step_of
from run.processes import World

if TYPE_CHECKING:
    from config_file import TrainingConfig

WANDB_NAME = 128  # characters that its server takes as a run's name; it says so when it is too late

logger = logging.getLogger(__name__)


class SilentLog:
    """The log of all processes but rank 0, which records nothing."""

    def record(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def advance(self, shown: str) -> None:
        pass

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        pass

    def sync(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


class RunLog(SilentLog):
    """{result_dir}/metrics.jsonl gets one object per record: `step` and what was measured there, written
    at once.

    step: the first one that is to come; records of it and later ones, which a run left that was killed after
    its last checkpoint, are removed. evaluation_due: so is an evaluation before it, which is repeated."""

    def __init__(self, config: "TrainingConfig", step: int, evaluation_due: bool) -> None:
        self._first = step
        self._path = path = config.folder.metrics
        with ExitStack() as opened, file_errors(path):
            self._wandb = None
            if config.wandb_mode != "disabled":
                self._wandb = opened.enter_context(start_wandb(config))
            if config.resumes:
                keep_records_before(path, step, evaluation_due)
            path.touch()
            self._bar = opened.enter_context(
                progress_bar("", config.max_steps, "step", done=step, at_once=True)
            )
            opened.enter_context(logging_redirect_tqdm())
            self._resources = opened.pop_all()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line, and send it to Weights & Biases. JSON has neither NaN nor infinity: null stands for them."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, "time": time.time(), **finite}, allow_nan=False)
        # Opened for each record: what could not be written would be tried, and fail, again at the file's end.
        with file_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self._wandb is not None:  # it ignores what comes for an earlier step, so a due evaluation's too
            self._wandb.log(dict(values), step=max(step, self._first))

    def advance(self, shown: str) -> None:
        """Advance the bar by one step and show a text behind it."""
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()

    def sync(self) -> None:
        """Make the records survive a power failure, as the checkpoint does that is written next."""
        with file_errors(self._path):
            sync(self._path)

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Log the losses of an evaluation on the screen, and record them."""
        text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        logger.info("after step %d: loss %s", step, text)
        self.record(step, {f"loss/{name}": loss for name, loss in losses.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, traceback)


def open_log(config: "TrainingConfig", world: World, start: Path | None) -> SilentLog:
    """Return the log of this process: rank 0 records, the others are silent. start: the checkpoint that the run
    resumes from."""
    if world.rank > 0:
        return SilentLog()
    if start is None:
        return RunLog(config, 0, evaluation_due=False)
    return RunLog(config, step_of(start), evaluation_due=read_manifest(start)["evaluation_due"])


def records_before(path: Path, step: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the lines and records of metrics.jsonl of steps before this one; an unfinished last line is left out.

    Raises:
        UserError: the file cannot be read, or a line is no record.
    """
    with file_errors(path):
        lines = path.read_bytes().splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            text = line.decode()
            record = json.loads(text)
            before = record["step"] < step
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: line {number} is not a record of a step ({error}): copy the file again, or remove "
                "the line"
            ) from error
        if before:
            found.append((text, record))
    return found


def keep_records_before(path: Path, step: int, evaluation_due: bool) -> None:
    """Leave out the records of this step and later ones, a due evaluation's, and a last line that is not
    whole. Raises as `records_before`."""
    kept = [
        line
        for line, record in records_before(path, step)
        if not (evaluation_due and record["step"] == step - 1 and "train_loss" not in record)
    ]
    write_text(path, "".join(kept))


def check_wandb(config: "TrainingConfig") -> None:
    """Ask Weights & Biases, if the run will need it, for what it would refuse later: names, settings in its
    environment variables and files, the key (at a terminal it asks for one).

    Raises:
        ConfigError: it refuses; better now than after the run's folder is made.
    """
    if config.wandb_mode == "disabled":
        return
    import wandb

    assert config.run_name is not None
    if len(config.run_name) > WANDB_NAME:
        raise ConfigError(
            f"--run_name {config.run_name}: has {len(config.run_name)} characters, and Weights & Biases "
            f"takes {WANDB_NAME}; choose a shorter one, or use --wandb_mode disabled"
        )
    with wandb_errors(f"--wandb_project {config.wandb_project}", "choose another name", ValueError):
        wandb.Settings(project=config.wandb_project)
    advice = "correct its WANDB_... variable or settings file"
    with wandb_errors(f"--wandb_mode {config.wandb_mode}", advice, ValueError):
        wandb.setup()
    if config.wandb_mode == "online":
        with wandb_errors("--wandb_mode online", "set WANDB_API_KEY, or use --wandb_mode offline"):
            wandb.login()


@contextmanager
def wandb_errors(what: str, advice: str, *more: type[Exception]) -> Iterator[None]:
    """Raise what Weights & Biases, or its server, refuses as a ConfigError in one line. more: ValueError
    where it checks settings, which is what pydantic raises."""
    import wandb

    try:
        yield
    except (wandb.errors.Error, *more) as error:
        raise ConfigError(f"{what}: {' '.join(str(error).split())}; {advice}") from error


def start_wandb(config: "TrainingConfig") -> Any:
    """Start, or resume, the run at Weights & Biases; when offline, in a folder of the run's folder.

    Of steps that a resumed run computes again, to the same numbers, Weights & Biases keeps the first record.
    """
    import wandb  # takes a second to import, which a run without it is spared

    memory = config.folder.wandb_id
    if not (config.resumes and memory.exists()):
        memory.write_text(uuid.uuid4().hex, encoding="utf-8")
    settings = json.loads(config.folder.config.read_text(encoding="utf-8"))
    with wandb_errors(f"--wandb_mode {config.wandb_mode}", "--wandb_mode offline needs no server"):
        return wandb.init(
            id=memory.read_text(encoding="utf-8"),
            resume="allow" if config.wandb_mode == "online" else None,
            project=config.wandb_project,
            name=config.run_name,
            dir=config.result_dir,
            mode=config.wandb_mode,
            config=settings,
        )
