"""Sum a run's scores into values of samples, documents and domains; report, query and curate by value.

runs = [ScoredRun.open("results/NAME")]  # write_values, write_report and curate take such a list
values = write_values(runs, Path("results/NAME/values"))
"""

from attribution.scored_run import AttributionError, ScoredRun, same_samples

__all__ = ["AttributionError", "ScoredRun", "same_samples"]
