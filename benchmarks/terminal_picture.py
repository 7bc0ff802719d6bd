"""Draw what a command prints, as an SVG.

python -m benchmarks.terminal_picture docs/terminal.svg ./Scripts/train.sh --architecture GPT2-Tiny --batch_size 2
"""

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH, FIRST, LAST = 110, 4, 34  # columns; lines shown of the beginning and of the end


def main(argv: list[str]) -> None:
    """Run the command argv[1:] and write the picture to argv[0]. Ends with the command's status if it fails."""
    path, *command = argv
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + f"{command[0]} ended with status {done.returncode}")
    # A progress bar overwrites its line: its last state is what a person sees.
    lines = [re.split(r"\r", line)[-1].rstrip() for line in done.stdout.replace("\r\n", "\n").split("\n")]
    if len(lines) > FIRST + LAST:
        lines = [*lines[:FIRST], "...", *lines[-LAST:]]
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ {' '.join(command)}", style="bold"))
    for line in lines:
        console.print(Text(line), overflow="ellipsis", no_wrap=True)
    Path(path).write_text(console.export_svg(title="train.sh"), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
