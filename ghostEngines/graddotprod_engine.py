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

from foundation.granularity import Granularity

from .backward_checks import LossScale, check_backward, check_calls
from .compiled_code import check_layers_outside, eager, is_compiled
from .contraction import Split
from .covered_layers import (
    Covered,
    check_optimizer,
    check_rows_are_independent,
    cover,
    mixing_modules,
)
from .errors import AttachError
from .graph import Graph, find_bypass, is_reentrant, raise_bypassed
from .guard import Guard, check_random, halves, random_states
from .joins import Join, hook_joins
from .layer_rules import CrossEntropyHead
from .memory import Scratch
from .micro_batches import MicroBatches
from .model_inputs import input_shape
from .options import check_options
from .passes import CurrentPass, Direction, JointBatch, Pass, Probes
from .precision import autocast_of
from .preconditioner import Preconditioner, check_adamw, has_stepped, preconditioners
from .row_maps import Samples
from .sinks import DotProducts
from .tap import REENTRANT
from .tapped import RowMapMaker, TappedLayer, TappedParameters

log = logging.getLogger(__name__)


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
        check_options(val_batch_size, granularity, direction, strategy, micro_batches)
        self.model = model
        self.val_batch_size = val_batch_size
        self.granularity = granularity
        self.direction = direction
        self.strategy = strategy
        self._micro_batches = MicroBatches(micro_batches)
        self._rows, self._samples, self._row_maps = rows, samples, dict(row_maps or {})
        self._guards = guard
        self.halves = halves  # of the samples, for the guard
        self._guarded: set[tuple[int, ...]] = set()  # the sizes of the batches that the guard has seen
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
        if self._samples is not None and is_compiled(self.model):
            raise AttachError(
                "samples that are not the model's rows can be followed in uncompiled code only: leave torch.compile out"
            )
        self._mixing = mixing_modules(self.model)
        check_rows_are_independent(self._mixing)
        covered = cover(self.model)
        if covered.ties and self._micro_batches.count > 1 and self.granularity == "per_layer":
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
        if (covered.layers, covered.rules) != (self._covered.layers, self._covered.rules):
            self._guarded = (
                set()
            )  # attached again to the same layers, as after an evaluation, the check stays valid
        self._covered, self._loss_scale = covered, loss_scale
        hooks = [
            # Before those of FSDP, which puts a model together for one forward and backward pass.
            self.model.register_forward_pre_hook(self._begin_pass, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(self._end_forward, always_call=True),
        ]
        if optimizer is not None and self._micro_batches.count > 1:
            hooks.append(optimizer.register_step_pre_hook(self._micro_batches.check_complete))
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
        self._micro_batches.forget()

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
        check_rows_are_independent(self._mixing)
        self._covered.check_unchanged(self.model)
        self._forget_joins()
        batch = self._batch(args, kwargs)
        guard = None
        if self._guards and batch.size not in self._guarded:
            count = batch.samples.count
            log.info("checking once that the %d samples of a step do not depend on each other", count)
            weight = self._weight()
            guard = Guard(self.halves(count), weight.device, autocast_of(weight) or weight.dtype)
            check_layers_outside(self.model, self._layers)
            if self._heads():
                with eager():
                    self._rehearse(guard, batch, args, kwargs)
            elif is_compiled(self.model):  # the guard cannot look into compiled code
                self._forward_stack.enter_context(eager())
        self._new_pass(batch, guard)
        weight = self._weight()
        self._autocast = autocast_of(weight)
        self._random_states = random_states(weight.device) if self._guards else []

    def _new_pass(self, batch: JointBatch, guard: Guard | None) -> Pass:
        count = len(self._layers) if self.granularity == "per_layer" else 1
        scales = self._preconditioners()
        by_direction = self._micro_batches.count > 1 or scales is not None
        sink = DotProducts(batch.split, self._scratch, self.strategy, by_direction)
        pass_ = self._current.pass_ = Pass(
            batch,
            Probes.make(batch.split, self._weight(), count),
            sink,
            self._micro_batches.count,
            self._micro_batches.kept,
            scales,
            guard=guard,
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

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> JointBatch:
        """Return what the model is called with: its samples, and how they divide into train and validation."""
        shape = input_shape(args, kwargs, self._rows)
        samples, what = Samples(shape[0]), "rows"
        if self._samples is not None:
            with torch.no_grad():
                samples, what = Samples.indexed(self._samples(*args, **kwargs), shape), "samples"
        self._micro_batches.begin(samples.count, what, self._parameter_versions())
        m = self.val_batch_size if self._micro_batches.number == 0 else 0
        n = samples.count - m
        if n <= 0:
            raise ValueError(
                f"the model was called with {samples.count} {what}, the last {m} of which are validation {what}: "
                f"there is no train {what[:-1]}. Append the validation {what} to the train {what}, or detach the "
                "engine."
            )
        return JointBatch(Split(n, m, self.granularity == "pairwise"), samples, shape)

    def _weight(self) -> Tensor:
        return next(parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def _parameter_versions(self) -> list[int]:
        return [parameter._version for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def _rehearsing(self) -> bool:
        pass_ = self._current.pass_
        return pass_ is not None and pass_.guard is not None and pass_.guard.rehearsing

    def _heads(self) -> bool:
        return any(isinstance(each.layer, CrossEntropyHead) for each in self._layers)

    def _rehearse(
        self, guard: Guard, batch: JointBatch, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Make the guard's own forward and backward passes, for a head that makes its gradients in the forward
        pass and so must know the half beforehand."""
        for mask in guard.masks:
            pass_ = self._new_pass(batch, guard)
            guard.weights = torch.where(mask, pass_.row_weights(), 0.0)
            guard.rehearsing, guard.losses = True, []
            states = random_states(self._weight().device)
            try:
                self.model(*args, **kwargs)
            finally:
                guard.rehearsing = False
                pass_.end_forward()
            check_random(states, self._weight().device)
            loss = guard.head_loss()
            if not loss.requires_grad:  # the head alone trains
                continue
            self._bypassed = self._find_bypass(loss)
            raise_bypassed(self._bypassed)
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

    def _end_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A model may call itself without gradients within its forward; "idle": the step could not begin.
        if torch.is_grad_enabled() and not self._rehearsing and self._current.phase == "forward":
            self._current.phase = "idle"
            self._forward_stack.close()
            self._pass().end_forward()
            check_random(self._random_states, self._weight().device)

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
        raise_bypassed(self._bypassed)
        if pass_.scale_probe.grad is None or all(probe.grad is None for probe in pass_.probes):
            raise RuntimeError(
                "the dot products need the backward pass of engine.joint_loss(losses): call its backward() "
                "(times any factor) before prepare_gradients()"
            )
        self._current.phase = "idle"
        check_backward(pass_, self._seen_gradients, self._micro_batches.count, self._loss_scale)
        uses = {each.group: pass_.uses.get(each.group) for each in self._layers}
        check_calls(
            [
                (each.name, type(each.layer).__name__, each.calls, 0 if found is None else found.calls)
                for each in self._layers
                for found in [uses[each.group]]
            ]
        )
        if pass_.guard is not None:
            pass_.guard.check_joint(pass_.scale_probe.grad)
            self._guarded.add(pass_.batch.size)
            pass_.guard = None
        self._prepared = True
        self._micro_batches.end(pass_)

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
        assert self._micro_batches.first is not None
        scale, first_scale = pass_.scale_probe.grad, self._micro_batches.first.scale_probe.grad
        assert scale is not None and first_scale is not None
        columns = [torch.zeros_like(probe) if probe.grad is None else probe.grad for probe in pass_.probes]
        # (n, k), or (n, L) per layer
        dots = torch.cat(columns, dim=1) * (pass_.split.n * self._micro_batches.count) / (scale * first_scale)
        if not self.scored:
            dots = torch.full_like(dots, torch.nan)
        if self.granularity == "total":
            return dots.squeeze(1)
        return dots * pass_.split.m if self.granularity == "pairwise" else dots
