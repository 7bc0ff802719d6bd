"""Ask of a LLaVA run whether the samples that help a validation row are about what the row is about.

    python -m benchmarks.image_ranking RESULT_DIR

The run has pairwise scores on the demo set of coloured shapes. For each validation row every training sample that was
used is ranked by its value for that row, the highest first; printed is the mean rank, from 0 to 1, of the samples that
share the row's colour and shape, its colour, its shape, and its question. By chance each is 0.5.
"""

import argparse
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from attribution.database import ScoreDatabase
from attribution.query.lookup import pair_sums
from attribution.scored_run import ScoredRun
from attribution.values import samples_sql
from foundation.paths import path_argument
from score_store.run_folder import RunFolder


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks.image_ranking", description=__doc__, allow_abbrev=False)
    parser.add_argument("result_dir", type=path_argument)
    run = ScoredRun.open(parser.parse_args(argv).result_dir)
    texts = pq.read_table(RunFolder(run.folder).samples).to_pandas().set_index("sample_id").text
    found = []
    with ScoreDatabase([run]) as database:
        for number, row in enumerate(run.validation_rows().to_pylist()):
            samples = database.query(samples_sql(pair_sums(number)), "ranking").to_pandas()
            ranks = samples.value.rank(ascending=False, pct=True).to_numpy()
            colour, shape = row["domain"].split("_")
            kinds = samples.domain.str.split("_", expand=True)
            questions = texts[samples.sample_id].str.partition("\n")[0].to_numpy()
            same = {
                "colour and shape": samples.domain == row["domain"],
                "colour": kinds[0] == colour,
                "shape": kinds[1] == shape,
                "question": questions == row["text"].partition("\n")[0],
            }
            found.append(
                {"row": row["domain"]}
                | {name: ranks[np.asarray(which)].mean() for name, which in same.items()}
            )
    table = pd.DataFrame(found)
    print(table.groupby("row").mean().round(3).to_string())
    print(table.drop(columns="row").mean().round(3).to_string())


if __name__ == "__main__":
    main(sys.argv[1:])
