"""Show progress bars on standard error."""

import sys

from tqdm import tqdm

SECONDS = 2  # work that ends earlier shows no bar
FILE_SECONDS = 10  # between two lines when standard error is a file, where no line is overwritten


def progress_bar(
    doing: str,
    total: float,
    unit: str = "it",
    *,
    done: int = 0,
    at_once: bool = False,
    terminal_only: bool = False,
) -> tqdm:
    """Return a progress bar.

    Args:
        doing: its label; "": none.
        total: in units.
        unit: "%" stands for a total of 100, and shows no rate.
        done: how much of the total is done when the bar begins.
        at_once: show the bar from the beginning, not after SECONDS.
        terminal_only: show nothing unless standard error is a terminal.
    """
    in_terminal = sys.stderr.isatty()
    return tqdm(
        desc=doing or None,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit != "step",  # steps are counted in full
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}" if unit == "%" else None,
        delay=0 if at_once else SECONDS,
        disable=terminal_only and not in_terminal,
        dynamic_ncols=in_terminal,
        mininterval=0.1 if in_terminal else FILE_SECONDS,
    )
