"""Test whether samples of the validation rows' own domain get the highest values.

    PILE_SAMPLE_DIR=... python -m benchmarks.domain_ranking --work_dir /tmp/domains --plot ranking.svg

Train GPT2-Tiny on the sample data with validation rows of one domain, and rank domains by the mean value of
their samples. The baseline shuffles the samples' domain labels 1000 times: it shows the mean values that a
domain of that size gets by chance. Values are averaged over several seeds.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from attribution.scored_run import ScoredRun
from attribution.values import write_values
from benchmarks.experiment import experiment_parser, make_sample_shards, run_side_by_side, train
from foundation.paths import path_argument

FEWEST = 20  # samples; a domain with fewer is not ranked
SHUFFLES = 1000


def rank_domains(samples: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return a table by domain, the highest mean first.

    Args:
        samples: domain, value.

    Returns:
        samples, mean, and the 2.5 % and 97.5 % quantiles of the mean with shuffled labels (low, high).
    """
    random, domains = np.random.default_rng(seed), samples.domain.to_numpy()
    found = samples.groupby("domain")["value"].agg(["size", "mean"]).rename(columns={"size": "samples"})
    shuffled = [
        samples.value.groupby(random.permutation(domains)).mean().reindex(found.index)
        for _ in range(SHUFFLES)
    ]
    found[["low", "high"]] = pd.concat(shuffled, axis=1).quantile([0.025, 0.975], axis=1).T.to_numpy()
    return found[found.samples >= FEWEST].sort_values("mean", ascending=False)


def draw(found: pd.DataFrame, target: str, path: Path) -> None:
    """Draw each domain's mean value as a bar, and the range of chance as a grey band."""
    from matplotlib.figure import Figure

    found = found[::-1]
    figure = Figure(figsize=(7.5, 0.42 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = ["#d55e00" if domain == target else "#0072b2" for domain in found.index]
    axes.barh(found.index, found["mean"], color=colours, height=0.6)
    for row, (low, high) in enumerate(zip(found.low, found.high, strict=True)):
        label = "95 % of means with shuffled labels" if row == 0 else None
        axes.fill_betweenx([row - 0.42, row + 0.42], low, high, color="0.45", alpha=0.45, label=label, lw=0)
    axes.set_xlabel("mean value of the domain's training samples\n(share of its step's total of |values|)")
    axes.set_title(f"Validation rows: {target}", fontsize="medium", loc="left")
    axes.legend(loc="lower right", frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main(argv: list[str]) -> None:
    parser = experiment_parser("benchmarks.domain_ranking", __doc__.split("\n")[0])
    parser.add_argument("--domain", default="PubMed Abstracts", help="of the validation rows")
    parser.add_argument("--val_batch_size", type=int, default=8)
    parser.add_argument("--plot", type=path_argument, help="draw the ranking into this file")
    args = parser.parse_args(argv)
    shards = make_sample_shards(args.work_dir / "shards")
    flags = {
        "pile_data_dir": shards, "block_size": 64, "batch_size": 8, "val_batch_size": args.val_batch_size,
        "val_set": f"val:{args.domain}", "max_steps": args.max_steps, "eval_interval": args.max_steps,
        "learning_rate": 1e-3,
    }  # fmt: skip
    calls = [
        partial(train, args.work_dir, f"domain-{seed}", seed=seed, **flags) for seed in range(args.seeds)
    ]
    runs = [ScoredRun.open(folder) for folder in run_side_by_side(args.jobs, calls)]
    for normalise in ("none", "absolute"):
        values = write_values(runs, args.work_dir / f"values-{normalise}", normalise=normalise)
        samples = values.read("samples").to_pandas().dropna(subset="value")
        found = rank_domains(samples)
        place = found.index.get_loc(args.domain) + 1
        print(f"\nnormalise {normalise}: {args.domain} is number {place} of {len(found)} domains")
        print(found.to_string(float_format=lambda number: f"{number:+.3e}"))
    if args.plot is not None:
        draw(found, args.domain, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
