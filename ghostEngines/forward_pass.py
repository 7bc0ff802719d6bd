"""The beginning and the end of a forward pass under the engine."""

import logging
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attach_checks import check_preconditioners, check_rows_are_independent, mixing_modules
from .compiled_code import check_guarded_pass, check_layers_in_uncompiled_code, eager
from .covered_layers import Covered
from .directions import Directions
from .guard import Guard, GuardPlan, check_random, random_states
from .guard_passes import check_by_rehearsal, has_fused_head
from .memory import Scratch
from .micro_batches import MicroBatches
from .model_inputs import input_shape, joint_batch, samples_of
from .options import EngineOptions
from .passes import CurrentPass, JointBatch, Pass, Probes
from .precision import autocast_of
from .preconditioner import Preconditioner
from .sinks import DotProducts
from .tapped import TappedLayer
from .updates import Updates

log = logging.getLogger(__name__)


class ForwardHooks:
    """The hooks on an attached model: they make a pass out of each forward pass with gradients."""

    def __init__(
        self,
        model: nn.Module,
        options: EngineOptions,
        covered: Covered,
        layers: list[TappedLayer],
        current: CurrentPass,
        micro_batches: MicroBatches,
        updates: Updates | None,
        guard_plan: GuardPlan,
    ) -> None:
        """Prepare the hooks `begin` and `end`.

        Args:
            current: is set to the pass that begins.
            updates: for direction "auto"; None: the direction is the gradient itself.
        """
        self.scratch = Scratch()
        self._model, self._options, self._covered, self._layers = model, options, covered, layers
        self._current, self._micro_batches = current, micro_batches
        self._updates, self._guard_plan = updates, guard_plan
        self.given: Directions | None = None  # None: the validation rows make the direction
        self.coming_weights: Tensor | None = None  # (n,) of the next pass's train rows; None: not announced
        # By id: FSDP puts other tensors into their places during a forward pass.
        self._owner_of = covered.owner_of
        self._mixing = mixing_modules(model)
        self._open = ExitStack()  # contexts that stay open during the forward pass

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass: divide the rows, run the guard if it is needed, give probes to the layers."""
        if not torch.is_grad_enabled() or self._current.rehearsing or self._current.paused:
            return
        check_rows_are_independent(self._mixing)
        self._covered.check_unchanged(self._model)
        if self._current.pass_ is not None:
            self._current.pass_.remove_joins()
        batch = self._batch(args, kwargs)
        try:
            guard = self._guard(batch, args, kwargs) if self._guard_plan.needed(batch.size) else None
            pass_ = self._new_pass(batch, guard)
        except BaseException:
            self._open.close()  # `end` closes it only for a pass that has begun
            raise
        finally:
            self.coming_weights = None
        weight = self._weight()
        self._current.autocast = autocast_of(weight)
        pass_.random_states = random_states(weight.device) if self._guard_plan.enabled else []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End the forward pass; raise if it was compiled, or drew random numbers."""
        # The phase is not "forward" if the pass could not begin, or the model called itself without
        # gradients.
        if self._current.paused:
            return
        if torch.is_grad_enabled() and not self._current.rehearsing and self._current.phase == "forward":
            self._current.phase = "idle"
            self._open.close()
            assert self._current.pass_ is not None
            self._current.pass_.end_forward()
            if not has_fused_head(self._layers):  # else the guard made passes of its own
                check_guarded_pass(self._current.pass_, self._layers)
            check_random(self._current.pass_.random_states, self._weight().device)

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> JointBatch:
        """Return the batch that the model is called with; check that it is the next micro-batch."""
        options = self._options
        shape = input_shape(args, kwargs, options.rows)
        samples = samples_of(options.samples, args, kwargs, shape)
        what = "rows" if options.samples is None else "samples"
        versions = [parameter._version for parameter in self._model.parameters() if parameter.requires_grad]
        self._micro_batches.begin(versions)
        if self.given is not None:
            return joint_batch(samples, what, 0, options.granularity, shape, given=self.given.count)
        m = options.val_batch_size if self._micro_batches.number == 0 else 0
        return joint_batch(samples, what, m, options.granularity, shape)

    def _guard(self, batch: JointBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Guard:
        """Return the guard for this pass; with a fused head, after its own passes."""
        count, weight = batch.samples.count, self._weight()
        log.info("checking once that the %d samples of a step do not depend on each other", count)
        guard = Guard(self._guard_plan.halves(count), weight.device, autocast_of(weight) or weight.dtype)
        check_layers_in_uncompiled_code(self._model, self._layers)
        if has_fused_head(self._layers):
            new_pass, forward = partial(self._new_pass, batch, guard), partial(self._model, *args, **kwargs)
            with eager():
                check_by_rehearsal(guard, self._current, self._layers, new_pass, forward)
        else:  # the guard cannot see into compiled code, and a caller may have compiled the model
            self._open.enter_context(eager())
        return guard

    def _new_pass(self, batch: JointBatch, guard: Guard | None) -> Pass:
        """Make a pass, set it as the current one and give its probes to the layers."""
        count = len(self._layers) if self._options.granularity == "per_layer" else 1
        preconditioners = self._preconditioners()
        by_direction = self._micro_batches.count > 1 or bool(preconditioners) or self.given is not None
        if self.given is not None and self._micro_batches.number == 0:
            self._micro_batches.kept.update(self.given.preconditioned(preconditioners or {}))
        pass_ = self._current.pass_ = Pass(
            batch,
            Probes.make(batch.split, self._weight(), count),
            DotProducts(batch.split, self.scratch, self._options.strategy, by_direction),
            self._micro_batches.count,
            self._micro_batches.kept,
            preconditioners,
            guard,
            first=self._micro_batches.first if self._micro_batches.number > 0 else None,
        )
        if self.coming_weights is not None:
            pass_.weigh(self.coming_weights)
            pass_.announced = True
        self._current.phase = "forward"
        for index, tapped in enumerate(self._layers):
            tapped.calls, tapped.probe = 0, pass_.probes[index % count]
        return pass_

    def _preconditioners(self) -> dict[str, Preconditioner] | None:
        """Return P by parameter, empty where it is 1 for all; None if it is not known yet."""
        if self._updates is None:
            return {}
        if self._micro_batches.number > 0 and self._micro_batches.first is not None:
            return self._micro_batches.first.preconditioners
        found = self._updates.preconditioners()
        check_preconditioners(self._options, found)
        return None if found is None else {self._owner_of[key]: each for key, each in found.items()}

    def _weight(self) -> Tensor:
        """Return a trainable parameter, whose device and dtype stand for the model's."""
        return next(parameter for parameter in self._model.parameters() if parameter.requires_grad)
