"""Check the engine on a model: the first thing to run on a model of your own.

    python -m ghostEngines.verify my_model.py:build     # build() -> model, batch[, loss] or a scored Trainer

First the guard runs, with halves of the rows that separate every two rows. Then the engine's training
gradients and dot products are compared with those of one backward pass per row, with each row in a forward
pass of its own.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from foundation.arguments import ArgumentParser
from foundation.errors import UserError
from foundation.granularity import total_of

from .graddotprod_engine import GradDotProdEngine
from .guard import separating_halves
from .losses import next_tokens, per_sample_losses

# Largest accepted relative error, compared with the results of single rows. Many float64 models round to
# float32 inside (Hugging Face's norms and rotary embeddings), which is an error of 1e-7.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}

Loss = Callable[[nn.Module, Any], Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """The error of one parameter's gradient, or of the dot products."""

    name: str
    error: float  # |got - want| relative to its scale
    bound: float

    @property
    def right(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Report:
    """The result of `verify`."""

    gradients: tuple[Line, ...]  # one for each trainable parameter
    dots: Line
    rows: int  # n + m

    @property
    def exact(self) -> bool:
        return self.dots.right and all(line.right for line in self.gradients)

    def __str__(self) -> str:
        width = max(len(line.name) for line in (*self.gradients, self.dots))
        lines = [f"{'':{width}}  relative error  bound"]
        for line in (*self.gradients, self.dots):
            verdict = "" if line.right else "  WRONG"
            lines.append(f"{line.name:{width}}  {line.error:14.1e}  {line.bound:.0e}{verdict}")
        wrong = [line.name for line in (*self.gradients, self.dots) if not line.right]
        result = "exact" if not wrong else f"WRONG: {', '.join(wrong)}"
        return "\n".join([*lines, f"{self.rows} rows: {result}"])


@runtime_checkable
class Verifiable(Protocol):
    """A training loop that knows its model, such as a scored Trainer (integrations/transformers)."""

    def verification(self) -> tuple[nn.Module, Any, Loss, dict[str, Any]]:
        """Return the model, a joint batch, the loss, and options of `verify`."""


def verify(
    model: nn.Module | Verifiable,
    batch: Any = None,
    loss: Loss | None = None,
    **options: Any,
) -> Report:
    """Compare the engine with one backward pass per row.

    Args:
        model: in the precision to check; float64 shows most. It is unchanged afterwards. Or a scored Trainer, alone:
            its model is checked on its first batch and validation rows, with its loss.
        batch: what the loss takes: a tensor, or a tuple or dictionary of tensors. Tensors with the same first
            dimension as the first tensor have the rows. The last `val_batch_size` rows are the validation
            rows.
        loss: (model, batch) -> one loss per row. None: the cross entropy of the model's logits. Then the
            batch is (x, y) as in `per_sample_losses`, or a dictionary with Hugging Face's `input_ids` and
            `labels`.
        options: of GradDotProdEngine. With `samples` the loss returns one loss per sample, and each sample's
            loss is differentiated alone, in a forward pass of the whole batch.

    Raises:
        UserError, RuntimeError, ValueError: the engine refuses the model; the message says why.
    """
    if isinstance(model, Verifiable):
        if batch is not None or loss is not None:
            raise UserError("give a Trainer alone: its batch and its loss are its own")
        model, batch, loss, own = model.verification()
        options |= own
    elif batch is None:
        raise UserError(f"give a batch, or a scored Trainer; got a {type(model).__name__} alone")
    return _verify(model, batch, loss or _cross_entropy, **options)


def _verify(model: nn.Module, batch: Any, loss: Loss, *, val_batch_size: int = 1, **options: Any) -> Report:
    tensors = [each for each in _leaves(batch) if each.dim() > 0]
    if not tensors:
        raise UserError("the batch has no tensor with rows")
    rows = tensors[0].shape[0]

    def of_row(i: int) -> Tensor:
        own: Tensor
        (own,) = loss(model, _part(batch, i, rows))
        return own

    def of_sample(i: int) -> Tensor:
        own: Tensor = loss(model, batch)[i]
        return own

    of_one = of_row
    if options.get("samples") is not None:
        of_one = of_sample
        with torch.no_grad():
            rows = len(loss(model, batch))
    n = rows - val_batch_size
    if n < 1:
        raise UserError(
            f"the batch has {rows} rows, the last {val_batch_size} of which are validation rows: give more"
        )
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.grad for name, p in named.items()}
    try:
        for p in named.values():
            p.grad = None
        engine = GradDotProdEngine(model, val_batch_size, **options)
        engine.guard_plan.halves = separating_halves
        with engine:
            engine.joint_loss(loss(model, batch)).backward()
            engine.prepare_gradients()
            got_dots = total_of(engine.dot_products(), engine.granularity)
        got = {name: p.grad for name, p in named.items()}
        want, want_dots, scales = _one_by_one(named, of_one, n, rows)
    finally:
        for name, p in named.items():
            p.grad = before[name]
    dtype = next(iter(named.values())).dtype
    bound = BOUNDS[dtype]
    largest = max(each.norm().item() for each in want.values())
    lines = []
    for name, gradient in want.items():
        mine = torch.zeros_like(gradient) if got[name] is None else got[name]
        assert mine is not None
        # A gradient that consists of rounding errors is compared with the largest gradient.
        scale = max(gradient.norm().item(), largest * torch.finfo(dtype).eps)
        lines.append(Line(name, (mine - gradient).norm().item() / scale, bound))
    dots_error = ((got_dots.double() - want_dots).abs() / scales).max().item()
    return Report(tuple(lines), Line("dot products", dots_error, bound), rows)


def _one_by_one(
    named: Mapping[str, nn.Parameter], loss: Callable[[int], Tensor], n: int, rows: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Differentiate each loss alone.

    Returns:
        The training gradient, the dot products (n,), and the scale of each, ‖∇ℓ_i‖·‖∇L_val‖ (n,).
    """

    def gradients(i: int) -> list[Tensor]:
        found = torch.autograd.grad(loss(i), list(named.values()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, named.values(), strict=True)]

    direction = gradients(n)
    for j in range(n + 1, rows):
        direction = [a + b for a, b in zip(direction, gradients(j), strict=True)]
    direction = [each / (rows - n) for each in direction]
    total = [torch.zeros_like(each) for each in direction]
    norm = torch.stack([each.double().norm() for each in direction]).norm()
    dots, scales = [], []
    for i in range(n):
        own = gradients(i)
        dots.append(sum((a.double() * b.double()).sum() for a, b in zip(own, direction, strict=True)))
        scales.append(torch.stack([each.double().norm() for each in own]).norm() * norm)
        total = [a + b / n for a, b in zip(total, own, strict=True)]
    return (
        dict(zip(named, total, strict=True)),
        torch.stack([torch.as_tensor(d) for d in dots]),
        torch.stack(scales),
    )


def _leaves(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch."""
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [each for each in values if isinstance(each, Tensor)]


def _part(batch: Any, i: int, rows: int) -> Any:
    """Return row i of a batch."""
    if isinstance(batch, Tensor):
        return batch[i : i + 1] if batch.dim() > 0 and batch.shape[0] == rows else batch
    if isinstance(batch, Mapping):
        return {
            key: _part(each, i, rows) if isinstance(each, Tensor) else each for key, each in batch.items()
        }
    return tuple(_part(each, i, rows) if isinstance(each, Tensor) else each for each in batch)


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross entropy of each row, from the model's logits."""
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return per_sample_losses(lambda _: model(**inputs), None, next_tokens(batch["labels"]))
    x, y = batch
    return per_sample_losses(model, x, y)


def load(where: str) -> tuple[Any, ...]:
    """Call MODULE:FUNCTION or FILE.py:FUNCTION and return what it returns.

    That is a model, a batch and perhaps a loss; or a scored Trainer, alone.
    """
    name, colon, function = where.rpartition(":")
    if not colon:
        raise UserError(f"{where!r}: give FILE.py:FUNCTION or MODULE:FUNCTION")
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        if spec is None or spec.loader is None or not Path(name).is_file():
            raise UserError(f"{name}: no such file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"{name}: {error}; give FILE.py:FUNCTION or MODULE:FUNCTION") from error
    if not hasattr(module, function):
        raise UserError(f"{name} has no {function!r}")
    result = getattr(module, function)()
    if isinstance(result, Verifiable):
        return (result,)
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise UserError(f"{where} must return (model, batch), (model, batch, loss) or a scored Trainer")
    return result


def main(argv: Sequence[str]) -> int:
    """Run the check and return the exit status: 0 exact, 1 wrong or refused, 2 wrong arguments."""
    parser = ArgumentParser("python -m ghostEngines.verify", description=__doc__)
    parser.add_argument(
        "build", metavar="FILE.py:FUNCTION", help="returns (model, batch) or (model, batch, loss)"
    )
    parser.add_argument(
        "--val_batch_size", type=int, default=1, help="how many of the last rows are validation rows [1]"
    )
    arguments = parser.parse_args(list(argv))
    try:
        built = load(arguments.build)
    except UserError as error:
        print(f"ghostEngines.verify: error: {error}", file=sys.stderr)
        return 2
    try:
        report = verify(*built, val_batch_size=arguments.val_batch_size)
    except (UserError, RuntimeError, ValueError) as error:
        print(f"refused: {error}")
        return 1
    print(report)
    return 0 if report.exact else 1
