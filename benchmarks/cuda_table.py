"""Run the tests and the benchmarks for a GPU in one command.

    python -m benchmarks.cuda_table --output cuda.md

Run tests/test_cuda.py, then benchmarks.step_time for GPT2-Small in bfloat16 at 1024 positions, with 2 and 16
train rows, 1 and 2 validation rows, eager and compiled. Print a Markdown table with the device's name.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch

from foundation.paths import path_argument

METHODS = ("hf_n", "hf_nm", "regular_nm", "graddotprod")


def measure(n: int, m: int, compiled: bool, rounds: int) -> dict[str, Any]:
    """Run benchmarks.step_time and return its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        shape = ["--batch_size", str(n), "--val_batch_size", str(m), "--rounds", str(rounds)]
        where = ["--device", "cuda", "--dtype", "bfloat16", "--output", str(report)]
        command = [
            sys.executable,
            "-m",
            "benchmarks.step_time",
            *shape,
            *where,
            "--methods",
            ",".join(METHODS),
        ]
        subprocess.run(command + ["--compile"] * compiled, check=True)
        result: dict[str, Any] = json.loads(report.read_text())
        return result


def format_row(n: int, m: int, compiled: bool, report: dict[str, Any]) -> str:
    """Return a line of the table."""
    ratios = {
        each["ratio"]: f"{each['median']:.3f} ({each['low']:.3f} to {each['high']:.3f})"
        for each in report["ratios"]
    }
    by_name = {each["name"]: each for each in report["results"]}
    peak = by_name["graddotprod"]["peak_bytes"] / by_name["regular_nm"]["peak_bytes"]
    milliseconds = f"{1e3 * by_name['graddotprod']['median_s']:.1f}"
    mode = "compiled" if compiled else "eager"
    against = [ratios[f"graddotprod / {name}"] for name in ("regular_nm", "hf_nm")]
    return f"| {n}, {m} | {mode} | {' | '.join(against)} | {milliseconds} | {peak:.2f} |"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks.cuda_table", allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=path_argument, help="also write the table to this file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU that PyTorch sees")
    subprocess.run([sys.executable, "-m", "pytest", "tests/test_cuda.py"], check=True)
    lines = [
        f"GPT2-Small, T=1024, bfloat16, {torch.cuda.get_device_name()}, PyTorch {torch.__version__}",
        "",
        "| n, m | blocks | GradDotProd / Regular on n+m | / Hugging Face on n+m | ms | peak / Regular's |",
        "|---|---|---|---|---|---|",
    ]
    for n, m, compiled in product((2, 16), (1, 2), (False, True)):
        lines.append(format_row(n, m, compiled, measure(n, m, compiled, args.rounds)))
    print("\n".join(lines))
    if args.output is not None:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
