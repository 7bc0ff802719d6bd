"""What a run's manager scores, when, and how exactly."""

from dataclasses import dataclass

FIRST_AUDITS = (2, 5, 10, 20, 50)  # steps, counted from 1: training changes fast at its beginning
AUDITED_ROWS = 4  # of a micro-batch, in later audits: all steps of a phase are looked at together


@dataclass(frozen=True)
class Scoring:
    """The options of GradDotProdManager that are not the engine's."""

    save_interval: int = 10  # steps between two writes to the disk
    every_exact: bool = False  # every step has exact values
    by_target: bool = False  # which come with their parts by target
    audit_interval: int = 0  # steps between two audits, after those of FIRST_AUDITS; 0: there are none
    lookahead: bool = False  # the validation gradient is taken where the step would end without this batch
    refresh_interval: int = 1  # K: steps for which a validation gradient is used

    def __post_init__(self) -> None:
        if self.by_target and not self.every_exact:
            raise ValueError("by_target=True splits the values of every step: give every_exact=True, too")

    @property
    def own_passes(self) -> bool:
        """Return whether the validation rows have passes of their own, and are not in the joint batch."""
        return self.lookahead or self.refresh_interval > 1

    def exact_rows(self, step: int, rows: int) -> int:
        """Return how many of a micro-batch's rows have exact values in a step, counted from 0."""
        if not self.exact(step):
            return 0
        return rows if self.every_exact or step + 1 in FIRST_AUDITS else min(rows, AUDITED_ROWS)

    def exact(self, step: int) -> bool:
        """Return whether a step, counted from 0, has exact values."""
        number, interval = step + 1, self.audit_interval
        return self.every_exact or (interval > 0 and (number in FIRST_AUDITS or number % interval == 0))
