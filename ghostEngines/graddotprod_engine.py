"""GradDotProdEngine: per-sample train-validation gradient dot products within training's one backward pass.

The idea: a dot product is a gradient. Every covered layer gets one more input, a probe of zeros that changes
no output. The layer's backward pass returns the gradient of the train rows for its weights, and the
per-sample dot products for the probe. Autograd adds the probe's gradients over the layers. So after
`loss.backward()` `probe.grad` is the vector of dot products, up to a known factor, and `p.grad` is the
training gradient.

Nothing is stored on modules or parameters, and autograd makes all gradients: DDP's reducers, gradient
clipping, accumulation and checkpointing see an ordinary model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from foundation.granularity import Granularity

from .attach_checks import (
    check_given,
    check_optimizer,
    check_row_maps,
    check_rows_are_independent,
    check_ties_by_layer,
    check_units_by_position,
    mixing_modules,
    updates_of,
)
from .backward_checks import LossScale, check_autocast, check_backward, check_calls
from .bypass import find_bypass, raise_bypassed
from .compiled_code import check_samples_in_uncompiled_code, check_whole_model, eager
from .covered_layers import Covered, cover
from .directions import Direction, Directions, by_name, check_direction
from .exact_values import ExactValues, RowWeights, exact_values
from .forward_mode import directional_derivatives
from .forward_pass import ForwardHooks
from .graph import Graph, is_reentrant
from .guard import GuardPlan
from .guard_passes import check_on_step, has_fused_head
from .joins import hook_joins
from .micro_batches import MicroBatches
from .options import EngineOptions
from .own_passes import Losses, check_undivided
from .passes import CurrentPass, DirectionKind, Pass
from .tap import REENTRANT
from .tapped import RowMapMaker, TappedLayer
from .updates import Updates, unwrapped
from .validation_gradient import ValidationGradient, point_after


class GradDotProdEngine:
    """Score every train row i of a step with <∇ℓ_i, ∇L_val>.

    First-order In-Run Data Shapley is computed from these scores (Wang et al., arXiv 2406.11011).

        engine = GradDotProdEngine(model, val_batch_size=m)
        engine.attach(optimizer)                  # or: with engine:
        losses = per_sample_losses(model, X, Y)   # (n+m,): one loss per row, train rows first
        engine.joint_loss(losses).backward()
        engine.prepare_gradients()                # p.grad is the gradient of losses[:n].mean()
        dots = engine.dot_products()              # (n,)
        engine.detach()                           # the model is as it was

    Args:
        model: any module whose trainable parameters all belong to covered layers. It is called on a joint
            batch: the first dimension is the row, and the last `val_batch_size` rows are the validation rows.
        val_batch_size: m.
        granularity: one score per train row ("total"), per pair of a train and a validation row ("pairwise"),
            or per train row and layer ("per_layer"), or per train row and position of the model's input, by where a
            weight was used ("token").
        direction: "gradient", or "auto" for <∇ℓ_i, P∘∇L_val>, with P what the optimizer given to `attach`
            multiplies a gradient with (update_rules.py): the same as "gradient" for plain SGD.
        strategy: the contraction strategy (strategies/) that every matrix must use; None: chosen by shape.
        micro_batches: G, how many forward and backward passes make one optimizer step, unless `begin_update` says
            another number. The first takes a joint batch. The others take train rows alone and use its validation
            gradient, which is kept (one model's size). Then `.grad` is the gradient of the mean loss of all n·G
            train rows, or of the sum that `joint_loss` is told, and `dot_products` returns those of the last
            pass's own rows.
        rows: the name of the model's input whose first dimension is the row; None: found by model_inputs.py.
        samples: for samples that are not the model's rows, such as documents packed into a row, or pairs of
            rows. A function that takes the model's arguments and returns the sample of each row (R,) or
            position (R, T), train samples first. The last `val_batch_size` samples are the validation
            samples; there is one loss per sample.
        row_maps: by layer name, for layers whose entries are not rows in order: a function of the layer's
            inputs and the number of rows that returns a row map (row_maps.py).
        guard: True to check at the first step that the rows are independent and in order (guard.py).

    Raises:
        AttachError: a val_batch_size or micro_batches below 1; an unknown granularity, direction or strategy;
            several micro-batches with granularity "pairwise" or strategy "gram", which need the validation
            rows in every pass; granularity "token" with strategy "instantiate", samples or row maps.
    """

    def __init__(
        self,
        model: nn.Module,
        val_batch_size: int,
        *,
        granularity: Granularity = "total",
        direction: DirectionKind = "gradient",
        strategy: str | None = None,
        micro_batches: int = 1,
        rows: str | None = None,
        samples: Callable[..., Tensor] | None = None,
        row_maps: Mapping[str, RowMapMaker] | None = None,
        guard: bool = True,
    ) -> None:
        self._options = EngineOptions(
            val_batch_size,
            granularity,
            direction,
            strategy,
            micro_batches,
            rows,
            samples,
            dict(row_maps or {}),
            guard,
        )
        self.model = model
        self.granularity, self.direction = granularity, direction
        self.guard_plan = GuardPlan(guard)
        self._current = CurrentPass()
        self._micro_batches = MicroBatches(micro_batches)
        # Set by `attach`.
        self._covered = Covered({}, {}, {})
        self._layers: list[TappedLayer] = []
        self._loss_scale: LossScale | None = None
        self._updates: Updates | None = None  # for direction "auto"
        self._optimizer: torch.optim.Optimizer | None = None
        self._forward: ForwardHooks | None = None
        self._directions: dict[str, Direction] = {}  # that are given, by the name that the caller gave
        self._restore: list[Callable[[], Any]] = []  # what `detach` calls

    def attach(
        self, optimizer: torch.optim.Optimizer | None = None, *, loss_scale: LossScale | None = None
    ) -> None:
        """Put a tap on every covered layer. A failed attach leaves the model unchanged.

        Args:
            optimizer: updates the model. It must update exactly the parameters that are scored.
            loss_scale: only for several micro-batches: the factor that the loop puts on the joint loss before
                `backward()`, or a function that returns it (a gradient scaler's `get_scale`). None: no
                factor.

        Raises:
            AttachError: a trainable parameter that no rule covers, or that the optimizer does not update;
                dropout or batch normalisation; weights that are shared in a way that is not covered; direction
                "auto" without an optimizer, or with one that no update rule covers.
            RuntimeError: the engine is attached already.
        """
        if self._restore:
            raise RuntimeError("the engine is attached already: detach it first")
        options, row_maps = self._options, self._options.row_maps
        check_whole_model(self.model)
        if options.samples is not None:
            check_samples_in_uncompiled_code(self.model)
        check_rows_are_independent(mixing_modules(self.model))
        covered = cover(self.model)
        if options.micro_batches > 1:
            check_ties_by_layer(options, covered)
        if options.granularity == "token":
            check_units_by_position(covered)
        check_row_maps(covered, row_maps)
        if optimizer is not None:
            check_optimizer(self.model, optimizer)
        self._updates, self._optimizer = updates_of(options, optimizer), optimizer
        if (covered.layers, covered.rules) != (self._covered.layers, self._covered.rules):
            # With the same layers, as after an evaluation, the guard's check stays valid.
            self.guard_plan.checked.clear()
        self._covered, self._loss_scale = covered, loss_scale
        self._layers = covered.tapped(self._current, row_maps)
        forward = ForwardHooks(
            self.model,
            options,
            covered,
            self._layers,
            self._current,
            self._micro_batches,
            self._updates,
            self.guard_plan,
        )
        forward.given, self._forward = self._given(self._directions), forward
        hooks = [
            # Before FSDP's hooks, which gather the parameters for one forward and backward pass.
            self.model.register_forward_pre_hook(forward.begin, prepend=True, with_kwargs=True),
            self.model.register_forward_hook(forward.end, always_call=True),
        ]
        if optimizer is not None:
            inner = unwrapped(optimizer)
            if isinstance(inner, torch.optim.Optimizer):  # exact values refuse any other
                hooks.append(inner.register_step_post_hook(self._micro_batches.stepped))
                hooks.append(inner.register_step_pre_hook(self._micro_batches.check_complete))
        self._restore = [hook.remove for hook in hooks]
        for tapped in self._layers:
            tapped.attach()
            self._restore.append(tapped.detach)

    def detach(self) -> None:
        """Restore the model as it was before `attach`. Raises RuntimeError if the engine is not attached."""
        if not self._restore:
            raise RuntimeError("the engine is not attached")
        for restore in self._restore:
            restore()
        if self._current.pass_ is not None:
            self._current.pass_.remove_joins()
        self._restore, self._layers, self._forward = [], [], None
        self._current.pass_, self._current.phase = None, "idle"
        self.forget_micro_batches()

    def begin_update(self, micro_batches: int) -> None:
        """Say how many micro-batches make the coming update, such as the short last one of an epoch.

        Those after it have the number that the engine was made with.

        Raises:
            RuntimeError: the engine is not attached; an update has begun and is not complete.
            AttachError: as the engine itself, of several micro-batches.
        """
        options = replace(self._options, micro_batches=micro_batches)
        if self._forward is None:
            raise RuntimeError("attach the engine first, then begin an update")
        if micro_batches > 1:
            check_ties_by_layer(options, self._covered)
        self._micro_batches.begin_update(micro_batches)

    def begin_pass(self, row_weights: Tensor) -> None:
        """Give the next pass's `row_weights` of `joint_loss` before the model is called, as a fused head needs them.

        Args:
            row_weights: (n,), of its train rows.

        Raises:
            RuntimeError: the engine is not attached.
        """
        if self._forward is None:
            raise RuntimeError("attach the engine first, then begin a pass")
        self._forward.coming_weights = torch.as_tensor(row_weights)

    def use_direction(self, direction: Direction | Mapping[str, Direction] | None) -> None:
        """Score rows against a direction that is given, from the next pass on.

        No validation rows are needed then: the model is called on train rows alone. With direction "auto" the
        engine multiplies the given direction by P anew in each step.

        Args:
            direction: a tensor of the parameter's shape for each parameter that trains, by its name in the model;
                or several such directions, by names of the caller's. None: the validation rows make it again.

        Raises:
            RuntimeError: the engine is not attached, and the direction is not None.
            AttachError: scores per pair, or per layer with tied weights or several directions, or strategy
                "gram", which needs validation rows.
            ValueError: a parameter is missing or unknown, or a tensor is of another shape, dtype or device.
        """
        if direction is None:
            self._directions = {}
        if self._forward is None:
            if direction is None:
                return
            raise RuntimeError("attach the engine first, then give it a direction")
        named: dict[str, Direction] = {}
        if direction is not None:
            named = by_name(direction)
            check_given(self._options, self._covered, len(named))
        self._forward.given = self._given(named)
        self._directions = named
        self.forget_micro_batches()

    def _given(self, named: Mapping[str, Direction]) -> Directions | None:
        if not named:
            return None
        return Directions.of(self.model, self._covered.owner_of, list(named.values()))

    @property
    def lr(self) -> float:
        """Return the learning rate that dot products are relative to: the largest of the optimizer's groups.

        Raises:
            RuntimeError: the engine was not attached with an optimizer and direction "auto".
        """
        if self._updates is None:
            raise RuntimeError('only direction "auto", with an optimizer, knows the learning rate')
        return self._updates.lr

    def validation_gradient(
        self, losses: Losses, *, lookahead: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the gradient of the validation rows' mean loss, for `use_direction`, and that loss.

        It takes a forward and a backward pass of its own, and changes neither the parameters nor their `.grad`.

        Args:
            losses: calls the model on the validation rows and returns their losses.
            lookahead: at the point to which the coming update would move the parameters with gradients of zero,
                by its momentum and decay, instead of at the parameters.

        Returns:
            By name of the parameter, in the accumulation dtype; and the mean loss at that point (scalar).

        Raises:
            AttachError: parameters that are divided among processes; no update rule for the optimizer.
            RuntimeError: the engine was not attached with an optimizer, and lookahead needs it.
        """
        gradient = ValidationGradient(self.model)
        at = point_after(self.model, self._all_updates(), with_gradients=False) if lookahead else None
        with self.paused():
            loss = gradient.add(losses, at)
        return gradient.total, loss

    def exact_values(
        self,
        train: Sequence[Losses],
        validation: Losses,
        *,
        clip_factor: float,
        global_rows: int | None = None,
        row_weights: Sequence[Tensor] | None = None,
        whole_batch: bool = True,
        by_target: bool = False,
    ) -> ExactValues:
        """Return each train row's share of what the coming update does for the validation loss.

        Call it when `.grad` is what the optimizer will be given, before `optimizer.step()`, and in every process.
        exact_values.py has the definition. It changes nothing, and needs memory of two of the model's size in
        float32.

        Args:
            train: for each micro-batch of this process, calls the model on its train rows alone and returns their
                losses, without autocast: the engine chooses that.
            validation: likewise, on the validation rows.
            clip_factor: what clipping multiplied the gradients by; 1 if it did not.
            global_rows: train rows in the update, over all processes and micro-batches, if all weigh the same.
            row_weights: for each micro-batch, the weights of its rows' losses (n,) in the update, if they do not;
                with several processes those of `joint_loss` divided by their number.
            whole_batch: False: `train` is on some of the rows only, whose values cannot be checked by their sum.
            by_target: True: `ExactValues.by_target` has each value's parts by the targets in the row's loss, at no
                cost. The model's losses must come from per_sample_losses or CrossEntropyHead, or `train` itself returns
                them by target, (n, T).

        Raises:
            AttachError: parameters that are divided among processes; no update rule for the optimizer.
            RuntimeError: the engine was not attached with an optimizer; the optimizer has stepped already, or
                micro-batches are missing; an operation of the model has no forward-mode derivative.
            ValueError: other rows or weights than the update's; their values do not add up to what `.grad` does;
                not one of global_rows and row_weights; losses that are not by target.
        """
        updates = self._all_updates()
        self._micro_batches.check_before_step()
        with self.paused():
            return exact_values(
                self.model,
                updates,
                train,
                validation,
                clip_factor=clip_factor,
                weights=RowWeights.of(global_rows, row_weights),
                autocast=self._current.gradients_autocast,
                whole_batch=whole_batch,
                by_target=by_target,
            )

    def by_target(self, losses: Losses, direction: Direction) -> Tensor:
        """Return <gradient of each target's part of ℓ_i, direction>, whose sum over the targets is <∇ℓ_i, direction>.

        One forward-mode pass of the rows, with neither `.grad` nor the state of the engine's own passes changed. The
        direction is taken as it is, also with direction "auto".

        Args:
            losses: calls the model on any rows and returns their losses, by target where that is asked for
                (per_sample_losses and CrossEntropyHead do so by themselves).
            direction: a tensor of the parameter's shape for each parameter that trains, by its name in the model.

        Returns:
            (n, T), 0 where there is no target.

        Raises:
            ValueError: losses that are not by target; a parameter is missing or unknown in the direction, or a tensor
                is of another shape, dtype or device.
            AttachError: parameters that are divided among processes.
            RuntimeError: an operation of the model has no forward-mode derivative.
        """
        check_undivided(self.model, "a split by target")
        check_direction(self.model, direction)
        with self.paused():
            return directional_derivatives(self.model, direction, losses, by_target=True)[1]

    def _all_updates(self) -> Updates:
        if self._optimizer is None:
            raise RuntimeError(
                "what the optimizer's step does is unknown: attach the engine with the optimizer"
            )
        return self._updates or Updates(self._optimizer)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the model run as without an engine during the block, with gradients of its own."""
        before, self._current.paused = self._current.paused, True
        try:
            with eager():
                yield
        finally:
            self._current.paused = before

    def forget_micro_batches(self) -> None:
        """Make the next forward pass the first of its step, whether or not the last step was finished."""
        self._micro_batches.forget()
        if self._forward is not None:
            self._forward.coming_weights = None

    def __enter__(self) -> "GradDotProdEngine":
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _pass(self) -> Pass:
        if self._current.pass_ is None:
            raise RuntimeError(
                "no forward pass has run with the engine attached: call the model on a joint batch first"
            )
        return self._current.pass_

    def joint_loss(self, losses: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the n train rows' losses plus the mean loss of the m validation rows.

        Only the first micro-batch has the validation rows. Multiply the result by any factor before
        `backward()`; with several micro-batches, by the `loss_scale` given to `attach`.

        Args:
            losses: per sample, (n+m,), train samples first.
            row_weights: (n,) w_i ≥ 0, so that `.grad` is the gradient of Σ w_i ℓ_i over all micro-batches of the
                update. None: those given to `begin_pass`; if none were, 1/(n·G), the mean over the update. Under
                DDP, which averages the processes' gradients, a row's weight in the update is w_i divided by their
                number. In float16 very small weights need a loss scale, as very small losses do.

        Raises:
            ValueError: losses or weights of another shape; weights that are negative, or given twice; micro-batches
                of unequal size without weights; a fused head, which needs them in `begin_pass`.
            RowsError: the guard finds rows that depend on each other.
            RuntimeError: reentrant activation checkpointing, or a parameter whose use by each sample is
                unknown.
        """
        pass_ = self._pass()
        if row_weights is not None:
            self._weigh(pass_, torch.as_tensor(row_weights))
        elif not pass_.announced:
            pass_.weights = None  # of an earlier call in this pass, such as for a log
        weights = pass_.row_weights()
        if losses.shape != weights.shape:
            raise ValueError(
                f"joint_loss takes one loss per sample, {tuple(weights.shape)}, train samples first; got "
                f"{tuple(losses.shape)}"
            )
        loss = (losses * weights).sum() + pass_.scale_probe
        pass_.bypassed = pass_.bypassed or find_bypass(loss, pass_.probes, self._layers)
        if pass_.guard is not None and is_reentrant(loss):
            raise RuntimeError(REENTRANT)
        if losses.requires_grad:
            if pass_.watched is not None:  # joint_loss was called before in this pass, such as for a log
                pass_.watched.remove()
            else:
                if pass_.free:
                    pass_.joins = hook_joins(Graph(loss), pass_.free, pass_.samples)
                if pass_.guard is not None and not has_fused_head(self._layers):
                    check_on_step(pass_.guard, self._current, losses * weights)
            pass_.watched = losses.register_hook(self._begin_backward)
        return loss

    def _weigh(self, pass_: Pass, row_weights: Tensor) -> None:
        if pass_.announced:
            raise ValueError(
                "the weights of this pass's rows are known from begin_pass(): do not give them again"
            )
        if has_fused_head(self._layers):
            raise ValueError(
                "the fused head makes its gradients in the model's forward: give the weights of the rows before, "
                "engine.begin_pass(row_weights), then the losses alone, engine.joint_loss(losses)"
            )
        pass_.weigh(row_weights)

    def _begin_backward(self, grad_losses: Tensor) -> None:
        """Record the gradient of the losses (n+m,), the first one that the backward pass computes."""
        weight = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        check_autocast(weight, self._current.autocast)
        self._current.phase = "backward"
        if self._current.pass_ is not None:  # None: the engine was detached after the forward pass
            self._current.pass_.loss_gradients.append(grad_losses)

    def prepare_gradients(self) -> None:
        """Check that the gradients and dot products are those of this step.

        `.grad` then holds the gradient of the train rows' mean loss, times the factor on the joint loss.

        Raises:
            RuntimeError: the backward pass did not start from `joint_loss`, or a weight was used without
                calling its layer.
            ValueError: another combination of the losses was differentiated.
            RowsError: the loss has a term besides the joint loss (checked at the first step).
        """
        pass_ = self._pass()
        raise_bypassed(pass_.bypassed)
        if pass_.scale_probe.grad is None or all(probe.grad is None for probe in pass_.probes):
            raise RuntimeError(
                "the dot products need the backward pass of engine.joint_loss(losses): call its backward() "
                "(times any factor) before prepare_gradients()"
            )
        self._current.phase = "idle"
        check_backward(pass_, self._loss_scale)
        check_calls(self._layers, pass_.uses)
        if pass_.guard is not None:
            pass_.guard.check_joint(pass_.scale_probe.grad)
            if pass_.weights is None or pass_.weights.any():  # else no row's loss was differentiated
                self.guard_plan.checked.add(pass_.batch.size)
            pass_.guard = None
        pass_.prepared, self._current.gradients_autocast = True, self._current.autocast
        self._micro_batches.end(pass_)

    @property
    def scored(self) -> bool:
        """Return True if the step has dot products. With "auto" and AdamW it has none before the first update."""
        return self._pass().preconditioners is not None

    @property
    def layer_names(self) -> list[str]:
        """Return the names of the covered layers, in the order of the columns of per-layer dot products.

        The cross terms of a tied weight are in the column of its first use in the forward pass.
        """
        return [tapped.name for tapped in self._layers]

    def dot_products(self) -> Tensor:
        """Return the dot products of the last pass's n train rows.

        There is no learning rate, row weight or loss scale in them. A row of weight zero has NaN: its gradient is not
        computed. With direction "auto" the validation rows'
        ∇ below is P∘∇; where the optimizer's groups have different learning rates, P contains each one's over
        the largest. The values are NaN if the step is not `scored`.

        Returns:
            On the model's device, in float32 (float64 for a float64 model). With directions that are given,
            (n,) or, if they have names, (n, k), in their order; else, and per layer or token:
            - total: (n,), <∇ℓ_i, ∇L_val>, with L_val the mean loss of the m validation rows
            - pairwise: (n, m), <∇ℓ_i, ∇ℓ_j>; the mean over j is the total
            - per_layer: (n, L), <∇ℓ_i, ∇L_val> over each layer's parameters, in the order of `layer_names`;
              the sum is the total
            - token: (n, T), Σ over the parameters <what the uses at position t of the model's input add to ∇ℓ_i,
              ∇L_val>; the sum is the total

        Raises:
            RuntimeError: `prepare_gradients` was not called.
        """
        pass_ = self._current.pass_
        # None: the micro-batches are forgotten, or another direction is given.
        first = self._micro_batches.first
        if pass_ is None or not pass_.prepared or first is None:
            raise RuntimeError("call prepare_gradients() after the backward pass, then dot_products()")
        dots = pass_.probed_dots(first)
        if not self.scored:
            dots = torch.full_like(dots, torch.nan)
        if pass_.split.given:
            has_parts = self.granularity in ("per_layer", "token")
            return dots if has_parts or "" not in self._directions else dots.squeeze(1)
        if self.granularity == "total":
            return dots.squeeze(1)
        return dots * pass_.split.m if self.granularity == "pairwise" else dots
