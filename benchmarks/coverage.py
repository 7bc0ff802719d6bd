"""Check which decoder architectures of transformers the engine covers exactly.

    python -m benchmarks.coverage --all        # all of them; writes docs/coverage.md
    python -m benchmarks.coverage llama mamba  # some of them

Compare the engine in float64 with one backward pass per row, each row called alone. The models are the tiny
random ones of benchmarks.decoders, tied and untied, with one and three validation rows, padded targets, and
eager and sdpa attention where both exist. Exact: all dot products and gradients agree within 1e-10. Refused:
the engine raises an error. Anything else is wrong, and the exit status is 1.
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import torch
import transformers
from torch import Tensor, nn

import ghostEngines
from benchmarks.decoders import BY_NAME, DECODERS, Attention, Decoder, Float64, data, logits
from benchmarks.oracle import Truth, per_sample
from ghostEngines import AttachError, GradDotProdEngine, RowsError, per_sample_losses, register_unit
from ghostEngines.layer_rules.units import UNITS

TABLE = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"
ENGINE = Path(ghostEngines.__file__).parent
TRAIN_ROWS = 4
VALIDATION_ROWS = (1, 3)
EXACT = 1e-10
Verdict = Literal["exact", "refused", "wrong"]
VERDICTS = get_args(Verdict)  # the worst last
ABSENT = "–"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one setting."""

    verdict: Verdict
    why: str = ""  # reason for a refusal or an error, in few words

    @property
    def text(self) -> str:
        return f"{self.verdict}: {self.why}" if self.why else self.verdict


Outcomes = Mapping[tuple[int, Attention], Outcome]


def gradient_error(truth: Truth, model: nn.Module) -> float:
    """Return the maximum over parameters of ‖Δ‖/‖want‖.

    A norm below 1e-4 of the whole gradient's counts as that much: a gradient that is zero by construction,
    such as that of an attention's key bias, is rounding noise.
    """
    wanted = truth.training_gradient()
    floor = 1e-4 * torch.stack([want.norm() for want in wanted.values()]).norm()
    parameters = dict(model.named_parameters())
    errors = []
    for name, want in wanted.items():
        got = parameters[name].grad
        difference = want if got is None else got - want
        errors.append(difference.norm() / torch.maximum(want.norm(), floor))
    return torch.stack(errors).max().item()  # NaN if one is


def engine_error(model: nn.Module, truth: Truth, x: Tensor, y: Tensor) -> float:
    """Run one step with the engine. Return the largest error of its dot products and gradients."""
    with GradDotProdEngine(model, len(x) - truth.n) as engine:
        losses = per_sample_losses(lambda rows: logits(model, rows), x, y)
        engine.joint_loss(losses).backward()
        engine.prepare_gradients()
        dots = engine.dot_products()
    return torch.tensor([truth.dot_error(dots), gradient_error(truth, model)]).max().item()


@contextmanager
def as_units(model: nn.Module, kind: str) -> Iterator[None]:
    """Register the model's modules of a class, given by its name, as units during the block."""
    kinds = {type(module) for module in model.modules() if type(module).__name__ == kind}
    if not kinds:
        raise ValueError(f"{type(model).__name__} has no {kind}")
    register_unit(*kinds)
    try:
        yield
    finally:
        for each in kinds:
            del UNITS[each]


def try_decoder(
    decoder: Decoder, tied: bool, m: int, attention: Attention, unit: str | None = None
) -> Outcome:
    """Compare the engine with the oracle on one setting of an architecture.

    Args:
        unit: name of a class to register as a unit; None: none.
    """
    with Float64(), ExitStack() as stack:
        model = decoder.build(tied, attention)
        if unit is not None:
            stack.enter_context(as_units(model, unit))
        x, y = data(TRAIN_ROWS + m)
        truth = per_sample(model, logits, x, y, TRAIN_ROWS)
        try:
            error = engine_error(model, truth, x, y)
        except Exception as raised:  # of any kind: the table has a verdict on every architecture
            if is_refusal(raised):
                return Outcome("refused", first_clause(raised))
            traceback.print_exc()
            return Outcome("wrong", f"{type(raised).__name__}: {first_clause(raised)}")
    return Outcome("exact") if error <= EXACT else Outcome("wrong", f"off by {error:.0e}")


def is_refusal(error: Exception) -> bool:
    """Return whether the engine raised the error itself, and not a function that it called."""
    if isinstance(error, AttachError | RowsError):
        return True
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Path(where.filename).is_relative_to(ENGINE) and (where.line or "").startswith("raise ")


def first_clause(error: Exception) -> str:
    """Return a message's first clause, without the explanation and the remedy."""
    text = str(error).partition("\n")[0]
    for end in (". ", ": ", "; ", " ("):
        text = text.partition(end)[0]
    return text.replace("|", "\\|")


def try_all(decoder: Decoder, tied: bool, unit: str | None = None) -> Outcomes:
    """Return the outcomes for all numbers of validation rows and implementations of attention."""
    if tied and not decoder.can_tie:
        return {}
    return {
        (m, attention): try_decoder(decoder, tied, m, attention, unit)
        for m, attention in product(VALIDATION_ROWS, decoder.attentions())
    }


def format_cell(outcomes: Outcomes) -> str:
    """Return a model's cell of the table: one text if all settings have the same outcome."""
    texts = {outcome.text for outcome in outcomes.values()}
    if len(texts) > 1:
        return "; ".join(f"m={m}, {attention}: {each.text}" for (m, attention), each in outcomes.items())
    return texts.pop() if texts else ABSENT


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    kind: str  # model_type in transformers
    published: str  # "tied" or "untied"
    tied: str  # outcome of the unmodified model
    untied: str  # outcome of the unmodified model
    unit: str  # `Decoder.unit`
    as_units: str  # outcome of the model as published, with that unit

    def __str__(self) -> str:
        return f"| {' | '.join(astuple(self))} |"

    def as_published(self) -> str:
        """Return the outcome of the unmodified model as published."""
        return self.tied if self.published == "tied" else self.untied


def measure(decoder: Decoder) -> tuple[Row, Verdict]:
    """Try all settings of an architecture.

    Returns:
        Its line, and the worst verdict on the unmodified model, or "wrong" if it is wrong with units.
    """
    tried = {tied: try_all(decoder, tied) for tied in (True, False)}
    published = decoder.published_tied()
    units: Outcomes = {} if decoder.unit is None else try_all(decoder, published, decoder.unit)
    row = Row(
        decoder.name,
        decoder.kind,
        "tied" if published else "untied",
        format_cell(tried[True]),
        format_cell(tried[False]),
        decoder.unit or ABSENT,
        format_cell(units),
    )
    verdicts = {outcome.verdict for each in tried.values() for outcome in each.values()}
    verdicts |= {outcome.verdict for outcome in units.values()} & {"wrong"}
    return row, max(verdicts, key=VERDICTS.index)


def read_table(path: Path = TABLE) -> dict[str, Row]:
    """Return the table's lines by architecture."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [Row(*line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in lines[1:]]
    return {row.name: row for row in rows}


def format_page(rows: Iterable[Row], summary: str) -> str:
    """Return the whole of docs/coverage.md."""
    lines = "\n".join(map(str, rows))
    return f"""# Decoders of transformers under the engine

Written by `python -m benchmarks.coverage --all`, not by hand, with transformers {transformers.__version__}.

Tiny random models with every kind of layer of the architecture, all parameters trained, in float64 (also
where transformers rounds to float32), targets padded, m = 1 and 3 validation rows, eager and sdpa attention
where both exist.

- exact: dot products and gradients are within 1e-10 of one backward pass for each row, each row called alone.
- refused: the engine raises an error. Its first words stand here; the error itself names the remedy.
- unit: the class to give to `ghostEngines.register_unit`, and what becomes of the model as published then.
- {ABSENT}: there is no such model, or no need of a unit.

{summary}

| architecture | model type | published | tied | untied | unit | with the unit |
|---|---|---|---|---|---|---|
{lines}
"""


def choose_decoders(argv: list[str]) -> tuple[list[Decoder], bool]:
    """Return the architectures that a command line names, and whether they are all."""
    parser = argparse.ArgumentParser("benchmarks.coverage", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--all", action="store_true", help=f"all of them, and write {TABLE.name}")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in BY_NAME]
    if unknown:
        parser.error(f"no such architecture: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    if args.all == bool(args.names):
        parser.error("give either names or --all")
    return (DECODERS if args.all else [BY_NAME[name] for name in args.names]), args.all


def main(argv: list[str]) -> int:
    decoders, every = choose_decoders(argv)
    transformers.utils.logging.set_verbosity_error()
    start, rows, counts = time.perf_counter(), [], Counter[Verdict]()
    for decoder in decoders:
        row, verdict = measure(decoder)
        rows.append(row)
        counts[verdict] += 1
        print(row, flush=True)
    numbers = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    summary = f"{len(rows)} configurations: {numbers}."
    print(f"{summary} {time.perf_counter() - start:.0f} s")
    if every and not counts["wrong"]:
        TABLE.write_text(format_page(rows, summary), encoding="utf-8")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
