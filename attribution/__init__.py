"""Sum a run's scores into values of samples, documents and domains; report, query and curate by value.

run = read_run("results/NAME")  # of main.py, or what score_store.write_run wrote
run.scores()  # a pyarrow dataset; run.samples().excerpt(group, number, tokens) is the text of a sample
write_values([run], Path("results/NAME/values")).read("samples")  # of attribution.values, as write_report and curate
"""

from attribution.errors import AttributionError
from attribution.scored_run import ScoredRun, read_run, same_samples

__all__ = ["AttributionError", "ScoredRun", "read_run", "same_samples"]
