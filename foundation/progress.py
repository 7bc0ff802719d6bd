"""Show progress bars on standard error."""

import sys

from tqdm import tqdm

SECONDS = 2  # work that ends earlier shows no bar
FILE_SECONDS = 10  # between two lines when standard error is a file, where no line is overwritten


def progress_bar(
    doing: str, total: float, unit: str = "it", *, at_once: bool = False, terminal_only: bool = False
) -> tqdm:
    """Return a progress bar.

    Args:
        doing: its label.
        total: in units.
        unit: "%" stands for a total of 100, and shows no rate.
        at_once: show the bar from the beginning, not after SECONDS.
        terminal_only: show nothing unless standard error is a terminal.
    """
    in_terminal = sys.stderr.isatty()
    return tqdm(
        desc=doing,
        total=total,
        unit=unit,
        unit_scale=True,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}" if unit == "%" else None,
        delay=0 if at_once else SECONDS,
        disable=terminal_only and not in_terminal,
        dynamic_ncols=in_terminal,
        mininterval=0.1 if in_terminal else FILE_SECONDS,
    )
