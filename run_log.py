"""What a run tells: JSON lines in its folder, Weights & Biases, a progress bar and one line per evaluation on
the screen."""

import json
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from config_file import TrainingConfig

logger = logging.getLogger(__name__)


class RunLog:
    """{result_dir}/metrics.jsonl gets one object per record: `step` and what was measured there, flushed at
    once."""

    def __init__(self, config: TrainingConfig) -> None:
        self._file = (config.result_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar = tqdm(total=config.max_steps, desc=config.run_name, unit="step", dynamic_ncols=True)
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()
        self._wandb = start_wandb(config) if config.wandb_mode != "disabled" else None

    def record(self, step: int, values: dict[str, Any]) -> None:
        """One line, and the same to Weights & Biases. values: JSON numbers by name; nested names are joined
        by a slash."""
        self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def advance(self, **shown: str) -> None:
        """One step further on the bar, with what to show beside it."""
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        """A line on the screen, and a record."""
        text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        logger.info("step %d: loss %s", step, text)
        self.record(step, {f"loss/{name}": loss for name, loss in losses.items()})

    def close(self) -> None:
        self._bar.close()
        self._redirect.__exit__(None, None, None)
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


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
