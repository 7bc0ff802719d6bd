"""A bar for what takes more than two seconds."""

import sys

from tqdm import tqdm

SECONDS = 2  # what is done earlier shows no bar
FILE_SECONDS = 10  # between two lines in a file, where nothing is overwritten


def progress_bar(doing: str, total: float, unit: str = "it") -> tqdm:
    """To standard error. unit "%": of which there are 100, and no rate is shown."""
    in_terminal = sys.stderr.isatty()
    return tqdm(
        desc=doing,
        total=total,
        unit=unit,
        unit_scale=True,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}" if unit == "%" else None,
        delay=SECONDS,
        dynamic_ncols=in_terminal,
        mininterval=0.1 if in_terminal else FILE_SECONDS,
    )
