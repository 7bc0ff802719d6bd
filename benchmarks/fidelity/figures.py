"""Make the tables and the plots of benchmarks/FIDELITY.md from what the experiments measured.

    python -m benchmarks.fidelity.figures --work_dir /tmp/fidelity --plot docs/fidelity.svg \
        --groups_plot docs/fidelity_groups.svg --corrupted_plot docs/fidelity_corrupted.svg

The tables are those of the experiments whose folder is in --work_dir.
"""

import argparse
import json
import sys
from types import ModuleType

from benchmarks.fidelity import figures_corrupted, figures_groups, figures_later, figures_one_step
from foundation.paths import path_argument

# By name of the folder: the module that has its tables and its plot, and the option of the plot.
EXPERIMENTS: dict[str, tuple[ModuleType, str]] = {
    "one_step": (figures_one_step, "plot"),
    "later": (figures_later, "later_plot"),
    "groups": (figures_groups, "groups_plot"),
    "corrupted": (figures_corrupted, "corrupted_plot"),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.fidelity.figures", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--work_dir", type=path_argument, required=True)
    for name, (_, option) in EXPERIMENTS.items():
        parser.add_argument(f"--{option}", type=path_argument, help=f"also draw {name} in this SVG")
    args = vars(parser.parse_args(argv))
    found = {
        name: [json.loads(path.read_text()) for path in sorted((args["work_dir"] / name).glob("*.json"))]
        for name in EXPERIMENTS
    }
    if not any(found.values()):
        parser.error(
            f"--work_dir {args['work_dir']} has no results of {', '.join(EXPERIMENTS)}: run one first"
        )
    for name, (module, option) in EXPERIMENTS.items():
        if found[name]:
            print(f"\n{module.tables(found[name])}\n")
        if args[option] is not None:
            if not found[name]:
                parser.error(f"--{option} needs results in {args['work_dir'] / name}: run {name} first")
            module.plot(found[name], args[option])


if __name__ == "__main__":
    main(sys.argv[1:])
