"""Which decoder architectures of transformers the engine covers, and exactly.

    python -m benchmarks.coverage --all        # all of them; writes docs/coverage.md
    python -m benchmarks.coverage llama mamba  # some of them

For the tiny random models of benchmarks.decoders, tied and untied, with one and three validation rows, padded
targets, eager and sdpa attention where both exist: the engine in float64 against one backward pass for each
row, each row called alone. Exact: no dot product and no gradient is further off than 1e-10. Refused: an error
that the engine raises. All else is wrong, and the exit status is then 1.
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import torch
import transformers
from torch import Tensor, nn

import ghostEngines
from benchmarks.decoders import BY_NAME, DECODERS, Attention, Decoder, Float64, data, logits
from benchmarks.oracle import Truth, per_sample
from ghostEngines import AttachError, GradDotProdEngine, RowsError, per_sample_losses

TABLE = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"
ENGINE = Path(ghostEngines.__file__).parent
TRAIN_ROWS = 4
VALIDATION_ROWS = (1, 3)
EXACT = 1e-10
Verdict = Literal["exact", "refused", "wrong"]
VERDICTS = get_args(Verdict)  # the worst last
ABSENT = "–"  # in the table: there is no such model


@dataclass(frozen=True)
class Outcome:
    """What became of one setting. why: of a refusal or an error, in few words."""

    verdict: Verdict
    why: str = ""

    @property
    def text(self) -> str:
        return f"{self.verdict}: {self.why}" if self.why else self.verdict


def gradient_error(truth: Truth, model: nn.Module) -> float:
    """Return the maximum over parameters of ‖Δ‖/‖want‖.

    A gradient that is zero by construction (of the bias of an attention's keys) is rounding noise, so no norm
    counts for less than 1e-4 of the whole gradient's.
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


def try_decoder(decoder: Decoder, tied: bool, m: int, attention: Attention = "eager") -> Outcome:
    """Compare the engine with the oracle on one setting of an architecture."""
    with Float64():
        model = decoder.build(tied, attention)
        x, y = data(TRAIN_ROWS + m)
        truth = per_sample(model, logits, x, y, TRAIN_ROWS)
        try:
            error = engine_error(model, truth, x, y)
        except Exception as raised:  # of any kind: the table says of every architecture what became of it
            if is_refusal(raised):
                return Outcome("refused", first_clause(raised))
            traceback.print_exc()
            return Outcome("wrong", f"{type(raised).__name__}: {first_clause(raised)}")
    return Outcome("exact") if error <= EXACT else Outcome("wrong", f"off by {error:.0e}")


def is_refusal(error: Exception) -> bool:
    """Return whether the engine raised the error itself: it did not come up in what the engine called."""
    if isinstance(error, AttachError | RowsError):
        return True
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Path(where.filename).is_relative_to(ENGINE) and (where.line or "").startswith("raise ")


def first_clause(error: Exception) -> str:
    """Return what a message says first: not the explanation and the remedy."""
    text = str(error).partition("\n")[0]
    for end in (". ", ": ", "; ", " ("):
        text = text.partition(end)[0]
    return text.replace("|", "\\|")


def settings(decoder: Decoder, tied: bool) -> Iterable[tuple[int, Attention]]:
    """Return the numbers of validation rows and implementations of attention that are tried."""
    return product(VALIDATION_ROWS, decoder.attentions()) if decoder.can_tie or not tied else ()


def cell(outcomes: Mapping[tuple[int, Attention], Outcome]) -> str:
    """Return what the table says of a model: one text if all settings have it."""
    texts = {outcome.text for outcome in outcomes.values()}
    if len(texts) > 1:
        return "; ".join(f"m={m}, {attention}: {each.text}" for (m, attention), each in outcomes.items())
    return texts.pop() if texts else ABSENT


def row(decoder: Decoder, cells: Mapping[bool, str]) -> str:
    """Return one line of the table. cells: by whether the weights are tied."""
    published = "tied" if decoder.published_tied() else "untied"
    return f"| {decoder.name} | `{decoder.kind}` | {published} | {cells[True]} | {cells[False]} |"


def read_table(path: Path = TABLE) -> dict[str, dict[bool, str]]:
    """Return the table's cells: architecture -> whether tied -> text."""
    lines = [
        line.split(" | ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    return {
        name.removeprefix("| "): {True: tied, False: untied.removesuffix(" |")}
        for name, _, _, tied, untied in lines[1:]
    }


def page(rows: list[str], summary: str) -> str:
    """Return the whole of docs/coverage.md."""
    return "\n".join(
        [
            "# Decoders of transformers under the engine",
            "",
            "Written by `python -m benchmarks.coverage --all`, not by hand, with transformers "
            f"{transformers.__version__}.",
            "",
            "Tiny random models with every kind of layer of the architecture, all parameters trained, in",
            "float64 (also where transformers rounds to float32), targets padded, m = 1 and 3 validation",
            "rows, eager and sdpa attention where both exist. Exact: dot products and gradients are within",
            "1e-10 of one backward pass for each row, each row called alone. Refused: the engine raises an",
            "error; its first words stand here, the error itself names the remedy.",
            "",
            summary,
            "",
            "| architecture | model type | published | tied | untied |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("benchmarks.coverage", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--all", action="store_true", help=f"all of them, and write {TABLE.name}")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in BY_NAME]
    if unknown or args.all == bool(args.names):
        parser.error(f"no architecture: {', '.join(unknown)}" if unknown else "give either names or --all")
    transformers.utils.logging.set_verbosity_error()
    start, rows, counts = time.perf_counter(), [], Counter[str]()
    for decoder in DECODERS if args.all else [BY_NAME[name] for name in args.names]:
        outcomes = {
            tied: {each: try_decoder(decoder, tied, *each) for each in settings(decoder, tied)}
            for tied in (True, False)
        }
        verdicts = {outcome.verdict for each in outcomes.values() for outcome in each.values()}
        counts[max(verdicts, key=VERDICTS.index)] += 1
        rows.append(row(decoder, {tied: cell(each) for tied, each in outcomes.items()}))
        print(rows[-1], flush=True)
    numbers = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    summary = f"{len(rows)} configurations: {numbers}."
    print(f"{summary} {time.perf_counter() - start:.0f} s")
    if args.all and not counts["wrong"]:
        TABLE.write_text(page(rows, summary), encoding="utf-8")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
