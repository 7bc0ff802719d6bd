"""From the scores of a run to what they say: values of samples, documents and domains, and what is made of
them.

    runs = [ScoredRun.open("results/NAME")]  # values.py, report.py, curate.py, query.py take such a list
    values = write_values(runs, Path("results/NAME/values"))
"""

from attribution.scored_run import AttributionError, ScoredRun, same_samples

__all__ = ["AttributionError", "ScoredRun", "same_samples"]
