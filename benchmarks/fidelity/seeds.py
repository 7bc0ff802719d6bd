"""The command line of an experiment that is measured seed by seed."""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.experiment import make_sample_shards
from benchmarks.fidelity.states import Setting
from foundation.paths import path_argument

VOCABULARY = 2048  # so that a training takes seconds


def measure_seeds(
    argv: list[str], name: str, about: str, seeds: int, run: Callable[[Setting, Path, Path], None]
) -> None:
    """Parse a command line and measure each seed that it asks for.

    Args:
        name: of the module, and of the folder in --work_dir.
        about: what --help says.
        seeds: how many, unless the command line says otherwise.
        run: measures one seed: its setting, the folder of shards, and the folder for its JSON files. It must be a
            function of a module, because it may run in another process.
    """
    parser = argparse.ArgumentParser(f"benchmarks.fidelity.{name}", description=about, allow_abbrev=False)
    parser.add_argument("--work_dir", type=path_argument, required=True, help=f"shards, and a folder {name}")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, of one thread each")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--clip", type=float, default=0.0, help="largest norm of the gradient; 0: any")
    args = parser.parse_args(argv)
    shards, folder = make_sample_shards(args.work_dir / "shards"), args.work_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.jobs) as pool:
        settings = [
            Setting("AdamW", args.lr, args.clip, seed, vocabulary=VOCABULARY) for seed in range(args.seeds)
        ]
        for done in [pool.submit(run, setting, shards, folder) for setting in settings]:
            done.result()
