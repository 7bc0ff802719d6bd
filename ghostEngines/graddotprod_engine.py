"""GradDotProdEngine: per-sample train-validation gradient dot products within the one backward pass of
training.

The idea: a dot product is a gradient. Every trainable layer gets one more input, a probe of zeros that
touches no output, and a backward pass that returns for its weights the gradient of the train rows only, and
for the probe its per-sample dot products. Autograd adds the probe's gradients over the layers, so after
`loss.backward()` `probe.grad` is the vector of dot products, up to a known scale, and `p.grad` is the
training gradient. Nothing is stored on modules or parameters and no gradient is made behind autograd's back:
reducers, clipping, accumulation and checkpointing see an ordinary model."""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .contraction import STRATEGIES, Split, Strategy
from .coverage import (
    check_optimizer,
    check_rows_are_independent,
    covered_layers,
    find_bypass,
    find_ties,
    mixing_modules,
)
from .errors import AttachError
from .layer_rules import RULES
from .losses import require
from .memory import Scratch
from .preconditioner import Preconditioner, check_adamw, has_stepped, preconditioners
from .step import DIRECTIONS, GRANULARITIES, CurrentStep, Direction, Granularity, LayerStep, Step


class GradDotProdEngine:
    """Scores every train row i of a step with <∇ℓ_i, ∇L_val>, the ingredient of first-order In-Run Data
    Shapley (Wang et al., arXiv 2406.11011).

        engine = GradDotProdEngine(model, val_batch_size=m)
        engine.attach(optimizer)                  # or: with engine:
        losses = per_sample_losses(model, X, Y)   # (n+m,): one loss per row, train rows first
        engine.joint_loss(losses).backward()
        engine.prepare_gradients()                # p.grad is the gradient of losses[:n].mean()
        dots = engine.dot_products()              # (n,)
        engine.detach()                           # the model is as it was

    model: any module whose trainable parameters all belong to layers with a rule; it is called on a joint
    batch, whose first dimension is the sample and whose last `val_batch_size` rows are the validation rows.
    granularity: one score for each train row ("total"), for each pair with a validation row ("pairwise"), or
    for each layer ("per_layer"). direction: "gradient", or "adamw" for <∇ℓ_i, P∘∇L_val> with AdamW's
    preconditioner P (preconditioner.py), of the optimizer that the engine is attached with. strategy: forces
    one way of contracting (contraction.py), None chooses by shape. micro_batches: how many forward and
    backward passes make one optimizer step. The first of them takes a joint batch, the others take n train
    rows alone and use its validation gradient, which is kept until the last (one model's size); `.grad` is
    then the gradient of the mean loss of all n · micro_batches train rows, and after each pass `dot_products`
    are those of its own rows. Raises AttachError for a val_batch_size or micro_batches below 1, an unknown
    granularity, direction or strategy, for several micro-batches with granularity "pairwise" or strategy
    "gram", which need the validation rows themselves, and for direction "adamw" with strategy "gram", which
    makes no direction."""

    def __init__(
        self,
        model: nn.Module,
        val_batch_size: int,
        *,
        granularity: Granularity = "total",
        direction: Direction = "gradient",
        strategy: Strategy | None = None,
        micro_batches: int = 1,
    ) -> None:
        for name, number in (("val_batch_size", val_batch_size), ("micro_batches", micro_batches)):
            if number < 1:
                raise AttachError(f"{name} must be at least 1, got {number}")
        if granularity not in GRANULARITIES:
            raise AttachError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        if direction not in DIRECTIONS:
            raise AttachError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
        if direction == "adamw" and strategy == "gram":
            raise AttachError('strategy "gram" makes no direction to precondition: choose another one')
        if strategy is not None and strategy not in STRATEGIES:
            raise AttachError(f"strategy must be one of {', '.join(STRATEGIES)} or None, got {strategy!r}")
        self.model = model
        self.val_batch_size = val_batch_size
        self.granularity = granularity
        self.direction = direction
        if micro_batches > 1 and (granularity == "pairwise" or strategy == "gram"):
            raise AttachError(
                f"several micro-batches with granularity={granularity!r} and strategy={strategy!r}: pairwise "
                "scores and gram need the validation rows in every pass, and only the first has them"
            )
        self.strategy = strategy
        self.micro_batches = micro_batches
        self._micro_batch = 0  # the one whose turn it is
        self._kept: dict[str, Any] = {}
        self._first: Step | None = None
        self._layers: list[LayerStep] = []
        self._current = CurrentStep()
        self._scratch = Scratch()
        self._optimizer: torch.optim.Optimizer | None = None
        self._optimizer_has_stepped = False
        self._prepared = False
        self._bypassed: str | None = None
        self._seen_gradients: list[Tensor] = []
        self._mixing: list[tuple[str, nn.Module]] = []
        self._ties: dict[str, str] = {}
        self._watched: RemovableHandle | None = None
        self._restore: list[Callable[[], Any]] = []

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Puts the rules in the place of the layers' forwards.

        Raises AttachError for a trainable parameter that no rule covers, or that the optimizer (if given)
        does not update, for dropout and batch normalisation, and for weights that are shared in any way but
        between an embedding and an output layer; RuntimeError if the engine is attached already. A failed
        attach leaves the model untouched."""
        if self._restore:
            raise RuntimeError("the engine is attached already: detach it first")
        self._mixing = mixing_modules(self.model)
        check_rows_are_independent(self._mixing)
        covered = covered_layers(self.model)
        self._ties = find_ties(covered)
        if self._ties and self.micro_batches > 1 and self.granularity == "per_layer":
            raise AttachError(
                f"per-layer scores of several micro-batches with tied weights ({', '.join(self._ties)}): the "
                "validation gradient that is kept is the sum of both ends, so that their parts cannot be "
                "told apart. Untie them, or use another granularity."
            )
        if optimizer is not None:
            check_optimizer(self.model, optimizer)
        if self.direction == "adamw":
            check_adamw(self.model, optimizer)
        self._optimizer, self._optimizer_has_stepped = optimizer, False
        hooks = (
            self.model.register_forward_pre_hook(self._begin_step, with_kwargs=True),
            self.model.register_forward_hook(self._end_forward, always_call=True),
        )
        self._restore = [hook.remove for hook in hooks]
        for name, layer in covered.items():
            layer_step = LayerStep(
                layer, name, RULES[type(layer)].forward, self._ties.get(name), self._current
            )
            layer.forward = layer_step.forward
            self._layers.append(layer_step)
            self._restore.append(partial(vars(layer).pop, "forward"))

    def detach(self) -> None:
        """The model is exactly as it was before `attach`. Raises RuntimeError if the engine is not
        attached."""
        if not self._restore:
            raise RuntimeError("the engine is not attached")
        for restore in self._restore:
            restore()
        self._restore, self._layers, self._scratch = [], [], Scratch()
        self._current.step, self._current.phase, self._prepared = None, "idle", False
        self.forget_micro_batches()

    def forget_micro_batches(self) -> None:
        """The next forward pass is the first of its step, whatever has become of the one before."""
        self._micro_batch, self._first = 0, None
        self._kept.clear()

    def __enter__(self) -> "GradDotProdEngine":
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _begin_step(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass with gradients begins: read n off the model's input and lay out fresh probes."""
        if not torch.is_grad_enabled():
            return
        self._check_unchanged()
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not inputs:
            raise ValueError("the model was called without a tensor, so that its number of rows is unknown")
        shape, m = inputs[0].shape, self.val_batch_size if self._micro_batch == 0 else 0
        rows = shape[0] if shape else 0
        if self._first is not None and self._micro_batch > 0 and rows != self._first.split.n:
            raise ValueError(
                f"micro-batch {self._micro_batch + 1} of {self.micro_batches} has {rows} rows, the first had "
                f"{self._first.split.n} train rows: all need the same number, and only the first is followed "
                "by the validation rows"
            )
        if rows <= m:
            raise ValueError(
                f"the model was called with {rows} rows, the last {m} of which are validation rows: there "
                "is no train row. Append the validation rows to the train rows, or detach the engine."
            )
        weight = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        split = Split(rows - m, m, self.granularity == "pairwise")
        count = len(self._layers) if self.granularity == "per_layer" else 1
        step = self._current.step = Step.begin(
            split,
            shape,
            self.strategy,
            weight,
            count,
            self._scratch,
            self.micro_batches,
            self._kept,
            self._preconditioners(),
        )
        self._current.phase = "forward"
        self._prepared, self._bypassed, self._seen_gradients, self._watched = False, None, [], None
        for index, layer_step in enumerate(self._layers):
            layer_step.calls, layer_step.probe = 0, step.probes[index % count]

    def _preconditioners(self) -> dict[int, Preconditioner] | None:
        """None where the direction is the gradient itself, or cannot be told yet."""
        if self.direction == "gradient":
            return None
        assert self._optimizer is not None
        self._optimizer_has_stepped = self._optimizer_has_stepped or has_stepped(self._optimizer)
        return preconditioners(self._optimizer) if self._optimizer_has_stepped else None

    def _check_unchanged(self) -> None:
        """Parameters and modes may change while the engine is attached; what trains must still be covered."""
        check_rows_are_independent(self._mixing)
        covered = {id(p) for each in self._layers for p in each.layer.parameters(recurse=False)}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in covered:
                raise RuntimeError(
                    f"'{name}' was unfrozen while the engine was attached: detach and attach again"
                )
        ties = find_ties({each.name: each.layer for each in self._layers})
        if ties != self._ties:
            raise RuntimeError(
                f"weights were tied, untied or frozen while the engine was attached "
                f"({', '.join(ties or self._ties)}): detach and attach again"
            )

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():  # a model may call itself without gradients within its forward
            self._current.phase = "idle"

    def _step(self) -> Step:
        if self._current.step is None:
            raise RuntimeError(
                "no forward pass has run with the engine attached: call the model on a joint batch first"
            )
        return self._current.step

    def joint_loss(self, losses: Tensor) -> Tensor:
        """The mean over the n train rows plus the mean over the m validation rows of the per-sample losses
        (n+m,); with several micro-batches the first mean is divided by their number, and the second is there
        in the first only.

        Multiply it by any factor before `backward()`. Raises ValueError for losses of another shape.
        """
        step = self._step()
        weights = step.row_weights()
        if losses.shape != weights.shape:
            raise ValueError(
                f"joint_loss takes one loss per row, {tuple(weights.shape)}, train rows first; got "
                f"{tuple(losses.shape)}"
            )
        loss = (losses * weights).sum() + step.scale_probe
        layers = [(each.name, each.layer) for each in self._layers]
        self._bypassed = self._bypassed or find_bypass(loss, step.probes, layers)
        if losses.requires_grad:
            if self._watched is not None:  # joint_loss may be asked for again, for a log
                self._watched.remove()
            self._watched = losses.register_hook(self._begin_backward)
        return loss

    def _begin_backward(self, grad_losses: Tensor) -> None:
        """The first gradient of a backward pass: that of the losses."""
        self._current.phase = "backward"
        self._seen_gradients.append(grad_losses)

    def prepare_gradients(self) -> None:
        """Checks that the gradients and dot products are those of this step. Nothing has to be moved: `.grad`
        holds the gradient of the mean loss of the train rows, times the factor put on the joint loss.

        Raises RuntimeError if the backward pass did not start from `joint_loss`, and if a layer that has a
        gradient did not run exactly once in the forward pass (its weight was used without calling it, or it
        was called twice)."""
        step = self._step()
        if step.scale_probe.grad is None or all(probe.grad is None for probe in step.probes):
            raise RuntimeError(
                "the dot products need the backward pass of engine.joint_loss(losses): call its backward() "
                "(times any factor) before prepare_gradients()"
            )
        self._current.phase = "idle"
        self._check_scale(step)
        if self._bypassed is not None:
            raise RuntimeError(
                f"the weight of layer '{self._bypassed}' was used in another way than by one call of the "
                "layer: that part of its gradient is in no dot product, and the validation rows' part of "
                "it in .grad. If another module reads the weight, call the layer instead; give each call a "
                "layer of its own."
            )
        for layer_step in self._layers:
            layer = layer_step.layer
            has_gradient = any(p.grad is not None for p in layer.parameters(recurse=False) if p.requires_grad)
            if has_gradient and layer_step.calls != 1:
                raise RuntimeError(
                    f"layer '{layer_step.name}' of type {type(layer).__name__} has a gradient but ran "
                    f"{layer_step.calls} times in the forward pass: its dot products are exact only for one "
                    "call. If another module reads its weight directly, call the layer instead; if it is "
                    "called repeatedly, give each call a layer of its own."
                )
        self._prepared = True
        if self._micro_batch == 0:
            self._first = step
        self._micro_batch = (self._micro_batch + 1) % self.micro_batches
        if self._micro_batch == 0:
            self._kept.clear()  # the graph still holds the dictionary

    def _check_scale(self, step: Step) -> None:
        """One backward pass, of the joint loss times a factor and nothing else."""
        if len(self._seen_gradients) != 1:
            raise RuntimeError(
                f"{len(self._seen_gradients)} backward passes went through the losses of one forward pass: "
                "the dot products are exact for one backward() of engine.joint_loss(losses)"
            )
        assert step.scale_probe.grad is not None
        (got,) = self._seen_gradients
        want = (step.scale_probe.grad * step.row_weights()).to(got.dtype)
        rtol = max(1e-4, 4 * torch.finfo(got.dtype).eps)  # losses of half precision have such a gradient
        require(
            torch.isclose(got, want, rtol=rtol, atol=0, equal_nan=True).all(),
            "the losses were differentiated in another combination than engine.joint_loss(losses): call "
            "backward() on it alone, times any factor",
        )

    @property
    def scored(self) -> bool:
        """Whether the step has dot products. It has none, with direction "adamw", as long as the optimizer
        has not made an update."""
        return self.direction == "gradient" or self._step().preconditioners is not None

    @property
    def layer_names(self) -> list[str]:
        """The covered layers in the order of the columns of per-layer dot products. A tied weight's cross
        terms are its embedding's."""
        return [layer_step.name for layer_step in self._layers]

    def dot_products(self) -> Tensor:
        """The dot products of the last step's n train rows, in float32 (float64 for a float64 model), on the
        model's device, in units of squared gradient: no learning rate, no batch size, no loss scale.

        - total: (n,), <∇ℓ_i, ∇L_val>, with L_val the mean loss of the m validation rows
        - pairwise: (n, m), <∇ℓ_i, ∇ℓ_j>; their mean over j is the total
        - per_layer: (n, L), <∇ℓ_i, ∇L_val> over each layer's parameters, in the order of `layer_names`; their
          sum is the total

        With direction "adamw" P∘∇ stands for the validation rows' ∇; NaN where the step is not `scored`.
        Raises RuntimeError before `prepare_gradients`."""
        if not self._prepared:
            raise RuntimeError("call prepare_gradients() after the backward pass, then dot_products()")
        step = self._step()
        assert self._first is not None
        scale, first_scale = step.scale_probe.grad, self._first.scale_probe.grad
        assert scale is not None and first_scale is not None
        columns = [torch.zeros_like(probe) if probe.grad is None else probe.grad for probe in step.probes]
        # (n, k), or (n, L) per layer
        dots = torch.cat(columns, dim=1) * (step.split.n * self.micro_batches) / (scale * first_scale)
        if not self.scored:
            dots = torch.full_like(dots, torch.nan)
        if self.granularity == "total":
            return dots.squeeze(1)
        return dots * step.split.m if self.granularity == "pairwise" else dots
