"""What a run tells: JSON lines in its folder, Weights & Biases, a progress bar and one line per evaluation on
the screen."""

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from config_file import ConfigError, TrainingConfig

logger = logging.getLogger(__name__)


class RunLog:
    """{result_dir}/metrics.jsonl gets one object per record: `step` and what was measured there, flushed at
    once."""

    def __init__(self, config: TrainingConfig) -> None:
        with ExitStack() as opened:
            self._wandb = None
            if config.wandb_mode != "disabled":
                self._wandb = opened.enter_context(start_wandb(config))
            file = (config.result_dir / "metrics.jsonl").open("a", encoding="utf-8")
            self._file = opened.enter_context(file)
            self._bar = opened.enter_context(progress_bar(config.max_steps))
            opened.enter_context(logging_redirect_tqdm())
            self._resources = opened.pop_all()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One line, and the same to Weights & Biases. JSON has no NaN and no infinity: null stands for
        them."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, "time": time.time(), **finite}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def advance(self, shown: str) -> None:
        """One step further on the bar, with what to show beside it."""
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        """A line on the screen, and a record."""
        text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        logger.info("after step %d: loss %s", step, text)
        self.record(step, {f"loss/{name}": loss for name, loss in losses.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, traceback)


def progress_bar(steps: int) -> tqdm:
    """Steps done, time left, and a postfix. In a file, where nothing is overwritten, a line every 10
    seconds."""
    in_terminal = sys.stderr.isatty()
    return tqdm(total=steps, unit="step", dynamic_ncols=in_terminal, mininterval=0.1 if in_terminal else 10)


def check_wandb(config: TrainingConfig) -> None:
    """Logs in to Weights & Biases if the run will need it, asking for the key at a terminal. ConfigError
    without one: better now than after the run's folder is made."""
    if config.wandb_mode != "online":
        return
    import wandb

    try:
        wandb.login()
    except wandb.errors.UsageError as error:
        raise ConfigError(
            f"--wandb_mode online: {error}; set WANDB_API_KEY, or use --wandb_mode offline"
        ) from error


def start_wandb(config: TrainingConfig) -> Any:
    """The run at Weights & Biases (a folder of the result_dir when offline)."""
    import wandb  # takes a second to import, which a run without it is spared

    return wandb.init(
        project=config.wandb_project,
        name=config.run_name,
        dir=config.result_dir,
        mode=config.wandb_mode,
        config=json.loads(Path(config.result_dir / "config.json").read_text(encoding="utf-8")),
    )
