"""From the scores of a run to what they say: values of samples, documents and domains, and what is made of
them.

    runs = [ScoredRun.open("results/NAME")]
    values = write_values(runs, Path("results/NAME/values"))
"""

from attribution.scored_run import AttributionError, ScoredRun, same_samples
from attribution.values import Values, write_values

__all__ = ["AttributionError", "ScoredRun", "Values", "same_samples", "write_values"]
