"""Check in a long run of two processes that memory and open files do not grow.

    python -m benchmarks.soak --max_steps 2000

Train GPT2-Tiny on the demo shards with torchrun, two processes on the CPU, with evaluations, checkpoints and
score files. Each process notes its resident memory and its open files every 50 steps. Compared are medians of
5 notes, at the end and after the first 200 steps. The check fails if memory has grown by 2 % or more, or if
more files are open.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.launch import ROOT, flags_of, torchrun

NOTE_EVERY, SETTLED, NOTES = 50, 200, 5
SETTINGS = {
    "architecture": "GPT2-Tiny", "device": "cpu", "block_size": 32, "batch_size": 2, "eval_interval": 100,
    "eval_iter": 1, "checkpoint_interval": 200, "run_name": "soak",
}  # fmt: skip


def run_watched(notes: str, flags: list[str]) -> None:
    """Run main.py in this process and append its notes to a file."""
    import main
    import training_loop

    step = training_loop.Trainer._step

    def noting(self: Any, number: int) -> None:
        step(self, number)
        if (number + 1) % NOTE_EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            note = {
                "rank": self.world.rank,
                "step": number + 1,
                "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
                "files": len(os.listdir("/proc/self/fd")),
            }
            with open(notes, "a") as file:
                file.write(json.dumps(note) + "\n")

    with patch.object(training_loop.Trainer, "_step", noting):
        sys.exit(main.main(flags))


def main(argv: list[str]) -> None:
    if argv[:1] == ["--watched"]:
        run_watched(argv[1], argv[2:])
    parser = argparse.ArgumentParser("benchmarks.soak", allow_abbrev=False)
    parser.add_argument("--max_steps", type=int, default=2000)
    args = parser.parse_args(argv)
    if args.max_steps < SETTLED + 2 * NOTES * NOTE_EVERY:
        parser.error(f"--max_steps {args.max_steps}: at least {SETTLED + 2 * NOTES * NOTE_EVERY}")
    with tempfile.TemporaryDirectory() as folder:
        notes = f"{folder}/notes.jsonl"
        settings = SETTINGS | {"max_steps": args.max_steps, "results_dir": folder}
        command = torchrun("-m", "benchmarks.soak", "--watched", notes, *flags_of(settings))
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines = [json.loads(line) for line in Path(notes).read_text().splitlines()]
    failed = False
    for rank in (0, 1):
        own = [line for line in lines if line["rank"] == rank and line["step"] > SETTLED]
        course = ", ".join(f"{note['step']}: {note['bytes'] / 1e6:.0f}" for note in own[::4])
        print(f"rank {rank}, step: MB  {course}")
        first, last = own[:NOTES], own[-NOTES:]
        memory = [statistics.median(note["bytes"] for note in part) for part in (first, last)]
        files = [statistics.median(note["files"] for note in part) for part in (first, last)]
        growth = memory[1] / memory[0] - 1
        print(
            f"rank {rank}: memory {memory[0] / 1e6:.0f} -> {memory[1] / 1e6:.0f} MB ({growth:+.2%}), open "
            f"files {files[0]:.0f} -> {files[1]:.0f}"
        )
        failed |= growth >= 0.02 or files[1] > files[0]
    if failed:
        raise SystemExit("memory or open files grow")


if __name__ == "__main__":
    main(sys.argv[1:])
