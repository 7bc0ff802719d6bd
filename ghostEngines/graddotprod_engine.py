"""GradDotProdEngine: per-sample train-validation gradient dot products within the one backward pass of
training.

The idea: a dot product is a gradient. Every trainable layer gets one more input, a probe of zeros that
touches no output, and a backward pass that returns for its weights the gradient of the train rows only, and
for the probe its per-sample dot products. Autograd adds the probe's gradients over the layers, so after
`loss.backward()` `probe.grad` is the vector of dot products, up to a known scale, and `p.grad` is the
training gradient. Nothing is stored on modules or parameters and no gradient is made behind autograd's back:
reducers, clipping, accumulation and checkpointing see an ordinary model."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foundation.granularity import GRANULARITIES, Granularity

from .contraction import Split
from .covered_layers import (
    Covered,
    check_optimizer,
    check_rows_are_independent,
    cover,
    mixing_modules,
)
from .errors import AttachError, RowsError
from .graph import Graph, find_bypass, is_reentrant
from .guard import Guard, halves, random_states
from .joins import Join, hook_joins
from .layer_rules import CrossEntropyHead
from .losses import require
from .memory import Scratch
from .model_inputs import input_shape
from .passes import DIRECTIONS, CurrentPass, Direction, Pass
from .precision import autocast_of
from .preconditioner import Preconditioner, check_adamw, has_stepped, preconditioners
from .row_maps import Samples
from .sinks import DotProducts
from .strategies import STRATEGIES
from .tap import REENTRANT
from .tapped import RowMapMaker, TappedLayer, TappedParameters

log = logging.getLogger(__name__)

LossScale = float | Callable[[], float | Tensor]


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

    Args:
        model: any module whose trainable parameters all belong to covered layers; it is called on a joint
        batch,
            whose first dimension is the sample and whose last `val_batch_size` rows are the validation rows.
        val_batch_size: m.
        granularity: one score for each train row ("total"), for each pair with a validation row ("pairwise"),
        or
            for each layer ("per_layer").
        direction: "gradient", or "adamw" for <∇ℓ_i, P∘∇L_val> with AdamW's preconditioner P
        (preconditioner.py),
            of the optimizer that the engine is attached with.
        strategy: forces one way of contracting (strategies/); None chooses by shape.
        micro_batches: how many forward and backward passes make one optimizer step. The first of them takes a
            joint batch, the others take n train rows alone and use its validation gradient, which is kept
            until the last (one model's size); `.grad` is then the gradient of the mean loss of all n ·
            micro_batches train rows, and after each pass `dot_products` are those of its own rows.
        rows: the name of the model's input whose first dimension is the row, where it cannot be told.
        samples: where samples are not the model's rows (documents packed into a row, pairs of rows): a function
            that is called as the model is and returns the sample of each row (R,), or of each position (R, T),
            train samples first; the last `val_batch_size` samples are the validation samples. The losses are
            then one for each sample.
        row_maps: for layers, by name, whose entries are not rows in order: what makes, of the layer's inputs
        and
            the number of rows, a row map (row_maps.py).
        guard: whether the first step checks that rows are what the engine takes them for (guard.py).

    Raises:
        AttachError: a val_batch_size or micro_batches below 1, an unknown granularity, direction or strategy;
            several micro-batches with granularity "pairwise" or strategy "gram", which need the validation
            rows themselves; direction "adamw" with strategy "gram", which makes no direction.
    """

    def __init__(
        self,
        model: nn.Module,
        val_batch_size: int,
        *,
        granularity: Granularity = "total",
        direction: Direction = "gradient",
        strategy: str | None = None,
        micro_batches: int = 1,
        rows: str | None = None,
        samples: Callable[..., Tensor] | None = None,
        row_maps: Mapping[str, RowMapMaker] | None = None,
        guard: bool = True,
    ) -> None:
        for name, number in (("val_batch_size", val_batch_size), ("micro_batches", micro_batches)):
            if number < 1:
                raise AttachError(f"{name} must be at least 1, got {number}")
        if granularity not in GRANULARITIES:
            raise AttachError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        if direction not in DIRECTIONS:
            raise AttachError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
        if strategy is not None and strategy not in STRATEGIES:
            raise AttachError(f"strategy must be one of {', '.join(STRATEGIES)} or None, got {strategy!r}")
        by_direction = strategy is None or STRATEGIES[strategy].by_direction
        if direction == "adamw" and not by_direction:
            raise AttachError(f'strategy "{strategy}" makes no direction to precondition: choose another one')
        if micro_batches > 1 and (granularity == "pairwise" or not by_direction):
            raise AttachError(
                f"several micro-batches with granularity={granularity!r} and strategy={strategy!r}: pairwise "
                "scores and gram need the validation rows in every pass, and only the first has them"
            )
        self.model = model
        self.val_batch_size = val_batch_size
        self.granularity = granularity
        self.direction = direction
        self.strategy = strategy
        self.micro_batches = micro_batches
        self._rows, self._samples, self._row_maps = rows, samples, dict(row_maps or {})
        self._guards = guard
        self.halves = halves  # of the samples, for the guard
        self._guarded: set[tuple[int, ...]] = set()  # the sizes of the batches that the guard has seen
        self._micro_batch = 0  # the one whose turn it is
        self._kept: dict[str, Any] = {}
        self._versions: list[int] = []  # of the parameters, at the first micro-batch
        self._first: Pass | None = None
        self._layers: list[TappedLayer] = []
        self._current = CurrentPass()
        self._scratch = Scratch()
        self._optimizer: torch.optim.Optimizer | None = None
        self._optimizer_has_stepped = False
        self._loss_scale: LossScale | None = None
        self._prepared = False
        self._bypassed: str | None = None
        self._seen_gradients: list[Tensor] = []
        self._mixing: list[tuple[str, nn.Module]] = []
        self._covered = Covered({}, {}, {})
        self._joins: list[Join] = []
        self._watched: RemovableHandle | None = None
        self._restore: list[Callable[[], Any]] = []
        self._random_states: list[Any] = []
        self._autocast: torch.dtype | None = None  # of the forward pass
        self._forward_stack = ExitStack()

    def attach(
        self, optimizer: torch.optim.Optimizer | None = None, *, loss_scale: LossScale | None = None
    ) -> None:
        """Put a tap on every covered layer.

        Args:
            optimizer: that updates the model; must update exactly what is scored.
            loss_scale: with several micro-batches, the factor that the loop puts on the joint loss before
                `backward()`, or a function that returns it (a gradient scaler's `get_scale`). None: no
                factor.

        Raises:
            AttachError: a trainable parameter that no rule covers, or that the optimizer (if given) does not
                update; dropout and batch normalisation; weights that are shared in a way that is not covered.
            RuntimeError: the engine is attached already.

        A failed attach leaves the model untouched.
        """
        if self._restore:
            raise RuntimeError("the engine is attached already: detach it first")
        if self._samples is not None and self._compiled():
            raise AttachError(
                "samples that are not the model's rows can be followed in uncompiled code only: leave torch.compile out"
            )
        self._mixing = mixing_modules(self.model)
        check_rows_are_independent(self._mixing)
        covered = cover(self.model)
        if covered.ties and self.micro_batches > 1 and self.granularity == "per_layer":
            raise AttachError(
                f"per-layer scores of several micro-batches with tied weights ({', '.join(covered.ties)}): the "
                "validation gradient that is kept is the sum of both ends, so that their parts cannot be "
                "told apart. Untie them, or use another granularity."
            )
        unknown = sorted(self._row_maps.keys() - covered.layers.keys())
        if unknown:
            raise AttachError(f"row_maps: {', '.join(unknown)} is no covered layer of the model")
        if optimizer is not None:
            check_optimizer(self.model, optimizer)
        if self.direction == "adamw":
            check_adamw(self.model, optimizer)
        self._optimizer, self._optimizer_has_stepped = optimizer, False
        self._covered, self._loss_scale, self._guarded = covered, loss_scale, set()
        hooks = [
            # Before those of FSDP, which puts a model together for one forward and backward pass.
            self.model.register_forward_pre_hook(self._begin_pass, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(self._end_forward, always_call=True),
        ]
        if optimizer is not None and self.micro_batches > 1:
            hooks.append(optimizer.register_step_pre_hook(self._check_complete))
        self._restore = [hook.remove for hook in hooks]
        groups, owners = covered.groups, covered.owners
        for name, layer in covered.layers.items():
            kind = TappedParameters if covered.rule(name).parameter else TappedLayer
            tapped = kind(
                layer, name, covered.rule(name), groups[name], owners[name], self._current,
                self._row_maps.get(name),
            )  # fmt: skip
            layer.forward = tapped.forward
            self._layers.append(tapped)
            self._restore.append(partial(vars(layer).pop, "forward"))

    def detach(self) -> None:
        """Leave the model exactly as it was before `attach`. Raises RuntimeError if the engine is not
        attached."""
        if not self._restore:
            raise RuntimeError("the engine is not attached")
        for restore in self._restore:
            restore()
        self._forget_joins()
        self._restore, self._layers, self._scratch = [], [], Scratch()
        self._current.pass_, self._current.phase, self._prepared = None, "idle", False
        self.forget_micro_batches()

    def forget_micro_batches(self) -> None:
        """Begin anew: the next forward pass is the first of its step, whatever has become of the one before."""
        self._micro_batch, self._first = 0, None
        self._kept.clear()

    def __enter__(self) -> "GradDotProdEngine":
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _begin_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward pass with gradients: read n off the model's input and lay out fresh probes."""
        if not torch.is_grad_enabled() or self._rehearsing:
            return
        self._check_unchanged()
        self._forget_joins()
        split, samples, shape = self._split(args, kwargs)
        guard = None
        if self._guards and self._batch_size(samples, shape) not in self._guarded:
            log.info(
                "checking that the %d samples of this step do not depend on each other, once", samples.count
            )
            weight = self._weight()
            guard = Guard(self.halves(samples.count), weight.device, autocast_of(weight) or weight.dtype)
            if self._heads():
                self._check_compiled()
                with self._eager():
                    self._rehearse(guard, split, samples, shape, args, kwargs)
            elif self._compiled():  # compiled code cannot be looked into
                self._check_compiled()
                self._forward_stack.enter_context(self._eager())
        self._new_pass(split, samples, shape, guard)
        weight = self._weight()
        self._autocast = autocast_of(weight)
        self._random_states = random_states(weight.device) if self._guards else []

    @staticmethod
    def _batch_size(samples: Samples, shape: torch.Size) -> tuple[int, ...]:
        """What the layers' row maps are told from."""
        return (samples.count,) if samples.index is None else tuple(shape[: samples.index.dim()])

    def _new_pass(self, split: Split, samples: Samples, shape: torch.Size, guard: Guard | None) -> Pass:
        count = len(self._layers) if self.granularity == "per_layer" else 1
        scales = self._preconditioners()
        by_direction = self.micro_batches > 1 or scales is not None
        sink = DotProducts(split, self._scratch, self.strategy, by_direction)
        pass_ = self._current.pass_ = Pass.begin(
            split, samples, shape, self._weight(), count, sink, self.micro_batches, self._kept, scales, guard
        )
        self._current.phase = "forward"
        self._prepared, self._bypassed, self._seen_gradients, self._watched = False, None, [], None
        for index, tapped in enumerate(self._layers):
            tapped.calls, tapped.probe = 0, pass_.probes[index % count]
        return pass_

    def _forget_joins(self) -> None:
        for join in self._joins:
            join.remove()
        self._joins = []

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Split, Samples, torch.Size]:
        """The division of the samples that the model is called with, what they are, and its input's shape."""
        shape = input_shape(args, kwargs, self._rows)
        samples = Samples(shape[0])
        if self._samples is not None:
            with torch.no_grad():
                samples = Samples.indexed(self._samples(*args, **kwargs), shape)
        m, rows = self.val_batch_size if self._micro_batch == 0 else 0, samples.count
        what = "rows" if self._samples is None else "samples"
        if self._first is not None and self._micro_batch > 0:
            if rows != self._first.split.n:
                raise ValueError(
                    f"micro-batch {self._micro_batch + 1} of {self.micro_batches} has {rows} {what}, the first had "
                    f"{self._first.split.n} train {what}: all need the same number, and only the first is followed "
                    f"by the validation {what}"
                )
            if self._versions != self._parameter_versions():
                raise RuntimeError(self._incomplete("the parameters were changed"))
        if self.micro_batches > 1 and self._micro_batch == 0:
            self._versions = self._parameter_versions()
        if rows <= m:
            raise ValueError(
                f"the model was called with {rows} {what}, the last {m} of which are validation {what}: there "
                f"is no train {what[:-1]}. Append the validation {what} to the train {what}, or detach the engine."
            )
        return Split(rows - m, m, self.granularity == "pairwise"), samples, shape

    def _weight(self) -> Tensor:
        return next(parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def _parameter_versions(self) -> list[int]:
        return [parameter._version for parameter in self.model.parameters() if parameter.requires_grad]

    def _check_complete(self, *_: Any) -> None:
        """Before the optimizer's step: all micro-batches were there."""
        if self._micro_batch != 0:
            raise RuntimeError(self._incomplete("the optimizer steps"))

    def _incomplete(self, what: str) -> str:
        return (
            f"{what} after {self._micro_batch} of {self.micro_batches} micro-batches: the gradient is that of "
            f"{self._micro_batch} and is divided by {self.micro_batches}. Make all of them, as at an epoch's end, or "
            "leave out this step: zero the gradients and call engine.forget_micro_batches()."
        )

    @property
    def _rehearsing(self) -> bool:
        pass_ = self._current.pass_
        return pass_ is not None and pass_.guard is not None and pass_.guard.rehearsing

    def _heads(self) -> bool:
        return any(isinstance(each.layer, CrossEntropyHead) for each in self._layers)

    def _compiled(self) -> bool:
        return any(module._compiled_call_impl is not None for module in self.model.modules())

    def _check_compiled(self) -> None:
        """Say at the first step, which is not compiled, what cannot be followed in compiled code."""
        compiled = [name for name, each in self.model.named_modules() if each._compiled_call_impl is not None]
        for tapped in self._layers:
            inside = [name for name in compiled if not name or f"{tapped.name}.".startswith(f"{name}.")]
            if inside and (tapped.rule.parameter or tapped.rule.unit):
                raise RuntimeError(
                    f"module '{tapped.name}' of type {type(tapped.layer).__name__} lies in compiled code "
                    f"('{inside[0]}'), and its gradient can be followed in uncompiled code only: "
                    "leave that module uncompiled"
                )

    @staticmethod
    def _eager() -> Any:
        return torch.compiler.set_stance("force_eager")

    def _rehearse(
        self,
        guard: Guard,
        split: Split,
        samples: Samples,
        shape: torch.Size,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """The guard's own passes for a head that makes its gradients in the forward pass, and so must be told
        before which rows are meant."""
        for mask in guard.masks:
            pass_ = self._new_pass(split, samples, shape, guard)
            guard.weights = torch.where(mask, pass_.row_weights(), 0.0)
            guard.rehearsing, guard.losses = True, []
            states = random_states(self._weight().device)
            try:
                self.model(*args, **kwargs)
            finally:
                guard.rehearsing = False
                pass_.end_forward()
            self._check_random(states)
            loss = guard.head_loss()
            if not loss.requires_grad:  # the head alone trains
                continue
            self._bypassed = self._find_bypass(loss)
            self._raise_bypassed()
            if pass_.free:
                self._joins = hook_joins(Graph(loss), pass_.free, pass_.samples)
            self._guard_backward(guard, mask, loss, retain_graph=False)
            self._forget_joins()
        guard.check_rows()

    def _guard_backward(self, guard: Guard, mask: Tensor, loss: Tensor, *, retain_graph: bool) -> None:
        pass_, self._current.phase = self._pass(), "backward"
        guard.begin(mask)
        try:
            loss = loss * guard.scale
            torch.autograd.grad(loss, pass_.probes, retain_graph=retain_graph, allow_unused=True)
        finally:
            guard.end()
            self._current.phase = "idle"

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
        covered = {id(p) for each in self._layers for p in each.parameters()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in covered:
                raise RuntimeError(
                    f"'{name}' was unfrozen while the engine was attached: detach and attach again"
                )
        ties = self._covered.ties_now()
        if ties != self._covered.ties:
            raise RuntimeError(
                f"weights were tied, untied or frozen while the engine was attached "
                f"({', '.join(name for names in (ties or self._covered.ties).values() for name in names)}): "
                "detach and attach again"
            )

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A model may call itself without gradients within its forward; "idle": the step could not begin.
        if torch.is_grad_enabled() and not self._rehearsing and self._current.phase == "forward":
            self._current.phase = "idle"
            self._forward_stack.close()
            self._pass().end_forward()
            self._check_random(self._random_states)

    def _check_random(self, before: list[Any]) -> None:
        if before and random_states(self._weight().device) != before:
            raise RowsError(
                "the forward pass drew random numbers (F.dropout, dropout_p of an attention, layer drop, noise on "
                "embeddings): the scores would be of a random model, and the training not the one without "
                "validation rows. Switch it off."
            )

    def _pass(self) -> Pass:
        if self._current.pass_ is None:
            raise RuntimeError(
                "no forward pass has run with the engine attached: call the model on a joint batch first"
            )
        return self._current.pass_

    def joint_loss(self, losses: Tensor) -> Tensor:
        """Return the mean over the n train rows plus the mean over the m validation rows of the per-sample
        losses (n+m,); with several micro-batches the first mean is divided by their number, and the second is
        there in the first only.

        Multiply it by any factor before `backward()`; with several micro-batches, by the one that `attach`
        was told.
        Raises ValueError for losses of another shape, RowsError if the guard finds rows that depend on each
        other.
        """
        pass_ = self._pass()
        weights = pass_.row_weights()
        if losses.shape != weights.shape:
            raise ValueError(
                f"joint_loss takes one loss per sample, {tuple(weights.shape)}, train samples first; got "
                f"{tuple(losses.shape)}"
            )
        loss = (losses * weights).sum() + pass_.scale_probe
        self._bypassed = self._bypassed or self._find_bypass(loss)
        if pass_.guard is not None and is_reentrant(loss):
            raise RuntimeError(REENTRANT)
        if losses.requires_grad:
            first = self._watched is None
            if self._watched is not None:  # joint_loss may be asked for again, for a log
                self._watched.remove()
            if first and pass_.free:
                self._joins = hook_joins(Graph(loss), pass_.free, pass_.samples)
            if first and pass_.guard is not None and not self._heads():
                self._guard_losses(pass_.guard, losses * weights)
            self._watched = losses.register_hook(self._begin_backward)
        return loss

    def _guard_losses(self, guard: Guard, weighted: Tensor) -> None:
        """The guard's passes over the graph of the step."""
        for mask in guard.masks:
            self._guard_backward(guard, mask, (weighted * mask).sum(), retain_graph=True)
        guard.check_rows()

    def _find_bypass(self, loss: Tensor) -> str | None:
        calls: dict[int, int] = {}
        for tapped in self._layers:
            for parameter in tapped.parameters():
                calls[id(parameter)] = calls.get(id(parameter), 0) + max(1, tapped.calls)
        layers = [(each.name, each.parameters()) for each in reversed(self._layers)]
        return find_bypass(loss, self._pass().probes, layers, calls)

    def _begin_backward(self, grad_losses: Tensor) -> None:
        """The first gradient of a backward pass: that of the losses."""
        weight, now = self._weight(), autocast_of(self._weight())
        if now is not None and now != self._autocast and weight.dtype != torch.float64:
            raise RuntimeError(
                "backward() runs inside torch.autocast, and the forward pass ran outside of it: the layers' own "
                f"backwards would be cast to {now}. Call backward() outside of the context."
            )
        self._current.phase = "backward"
        self._seen_gradients.append(grad_losses)

    def prepare_gradients(self) -> None:
        """Check that the gradients and dot products are those of this step. Nothing has to be moved: `.grad`
        holds the gradient of the mean loss of the train rows, times the factor put on the joint loss.

        Raises RuntimeError if the backward pass did not start from `joint_loss`, if a weight was used without
        calling its layer, or if the loss has a term beside the joint loss (RowsError, at the first step)."""
        pass_ = self._pass()
        self._raise_bypassed()
        if pass_.scale_probe.grad is None or all(probe.grad is None for probe in pass_.probes):
            raise RuntimeError(
                "the dot products need the backward pass of engine.joint_loss(losses): call its backward() "
                "(times any factor) before prepare_gradients()"
            )
        self._current.phase = "idle"
        self._check_scale(pass_)
        for tapped in self._layers:
            uses = pass_.uses.get(tapped.group)
            if tapped.calls > 1 and (uses is None or uses.calls < tapped.calls):
                raise RuntimeError(
                    f"layer '{tapped.name}' of type {type(tapped.layer).__name__} ran {tapped.calls} times in compiled "
                    "code: there its dot products are exact for one call only. Leave its block uncompiled."
                )
        if pass_.guard is not None:
            pass_.guard.check_joint(pass_.scale_probe.grad)
            self._guarded.add(self._batch_size(pass_.samples, pass_.input_shape))
            pass_.guard = None
        self._prepared = True
        if self._micro_batch == 0:
            self._first = pass_
        self._micro_batch = (self._micro_batch + 1) % self.micro_batches
        if self._micro_batch == 0:
            self._kept.clear()  # the graph still holds the dictionary

    def _raise_bypassed(self) -> None:
        if self._bypassed is not None:
            raise RuntimeError(
                f"the weight of layer '{self._bypassed}' was used in another way than by calling the "
                "layer: that part of its gradient is in no dot product, and the validation rows' part of "
                "it in .grad. If another module reads the weight, call the layer instead; or take that module as one "
                "layer, ghostEngines.register_unit(ItsClass); or freeze the weight."
            )

    def _check_scale(self, pass_: Pass) -> None:
        """One backward pass, of the joint loss times a factor and nothing else."""
        if len(self._seen_gradients) != 1:
            raise RuntimeError(
                f"{len(self._seen_gradients)} backward passes went through the losses of one forward pass: "
                "the dot products are exact for one backward() of engine.joint_loss(losses)"
            )
        assert pass_.scale_probe.grad is not None
        (got,) = self._seen_gradients
        want = (pass_.scale_probe.grad * pass_.row_weights()).to(got.dtype)
        rtol = max(1e-4, 4 * torch.finfo(got.dtype).eps)  # losses of half precision have such a gradient
        require(
            torch.isclose(got, want, rtol=rtol, atol=0, equal_nan=True).all(),
            "the losses were differentiated in another combination than engine.joint_loss(losses): call "
            "backward() on it alone, times any factor",
        )
        if self.micro_batches > 1:
            self._check_factor(pass_.scale_probe.grad)

    def _check_factor(self, got: Tensor) -> None:
        """joint_loss divides by the number of micro-batches itself; a loop that does so too trains otherwise."""
        scale = 1.0 if self._loss_scale is None else self._loss_scale
        want = scale() if callable(scale) else scale
        want = torch.as_tensor(want, dtype=got.dtype, device=got.device)
        require(
            torch.isclose(got, want, rtol=1e-4, atol=0, equal_nan=True),
            "engine.joint_loss(losses) was multiplied by another factor than attach() was told: it is divided by the "
            f"number of micro-batches ({self.micro_batches}) already. Do not divide the loss again (accelerate does: "
            "gradient_accumulation_steps=1 there), or say so with attach(..., loss_scale=...), a number or a function "
            "such as a gradient scaler's get_scale.",
        )

    @property
    def scored(self) -> bool:
        """Whether the step has dot products. It has none, with direction "adamw", as long as the optimizer
        has not made an update."""
        return self.direction == "gradient" or self._pass().preconditioners is not None

    @property
    def layer_names(self) -> list[str]:
        """The covered layers in the order of the columns of per-layer dot products. A tied weight's cross
        terms are those of its first use in the forward pass."""
        return [tapped.name for tapped in self._layers]

    def dot_products(self) -> Tensor:
        """Return the dot products of the last step's n train rows, in float32 (float64 for a float64 model),
        on the model's device, in units of squared gradient: no learning rate, no batch size, no loss scale.

        - total: (n,), <∇ℓ_i, ∇L_val>, with L_val the mean loss of the m validation rows
        - pairwise: (n, m), <∇ℓ_i, ∇ℓ_j>; their mean over j is the total
        - per_layer: (n, L), <∇ℓ_i, ∇L_val> over each layer's parameters, in the order of `layer_names`; their
          sum is the total

        With direction "adamw" P∘∇ stands for the validation rows' ∇; NaN where the step is not `scored`.
        Raises RuntimeError before `prepare_gradients`."""
        if not self._prepared:
            raise RuntimeError("call prepare_gradients() after the backward pass, then dot_products()")
        pass_ = self._pass()
        assert self._first is not None
        scale, first_scale = pass_.scale_probe.grad, self._first.scale_probe.grad
        assert scale is not None and first_scale is not None
        columns = [torch.zeros_like(probe) if probe.grad is None else probe.grad for probe in pass_.probes]
        # (n, k), or (n, L) per layer
        dots = torch.cat(columns, dim=1) * (pass_.split.n * self.micro_batches) / (scale * first_scale)
        if not self.scored:
            dots = torch.full_like(dots, torch.nan)
        if self.granularity == "total":
            return dots.squeeze(1)
        return dots * pass_.split.m if self.granularity == "pairwise" else dots
