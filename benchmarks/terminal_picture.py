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

WIDTH, FIRST, LAST = 100, 4, 26  # columns; lines shown of the beginning and of the end
BAR = re.compile(r"\s*\d+%\|")
FONTS = re.compile(
    r"@font-face \{.*?\}", re.DOTALL
)  # of another host; the reader's own monospace font will do


def shown_lines(text: str) -> list[str]:
    """Return the lines that a person sees in the end: a progress bar overwrites its line."""
    lines = [re.split(r"\r", line)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    bars = [number for number, line in enumerate(lines) if BAR.match(line)]
    lines = [line for number, line in enumerate(lines) if line.strip() and number not in bars[:-1]]
    return lines if len(lines) <= FIRST + LAST else [*lines[:FIRST], "...", *lines[-LAST:]]


def main(argv: list[str]) -> None:
    """Run the command argv[1:] and write the picture to argv[0]; end with the command's status if it fails."""
    path, *command = argv
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{command[0]} ended with status {done.returncode}")
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ {' '.join(command)}", style="bold"))
    for line in shown_lines(done.stdout.replace(f"{Path.cwd()}/", "")):
        console.print(Text(line), overflow="ellipsis", no_wrap=True)
    Path(path).write_text(
        FONTS.sub("", console.export_svg(title="train.sh")).replace("Fira Code", "monospace"),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
