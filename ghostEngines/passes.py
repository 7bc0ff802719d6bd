"""The state of one forward and backward pass under the engine."""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from .contraction import Split, accumulation_dtype
from .losses import require
from .memory import Keep
from .preconditioner import Preconditioner
from .row_maps import Samples
from .sinks import DotProducts

if TYPE_CHECKING:
    from .guard import Guard
    from .joins import Join
    from .tap import Call, Recomputable
    from .uses import Uses

DirectionKind = Literal["auto", "gradient"]
DIRECTIONS: tuple[DirectionKind, ...] = ("auto", "gradient")


def refuse_to_be_copied(self: object) -> NoReturn:
    """Raise RuntimeError; the `__reduce__` of objects that a copy of the model would share."""
    raise RuntimeError(
        "a model with an engine attached cannot be copied or pickled, since the copy would have an engine "
        "that nobody could detach: detach it first, or copy the state_dict"
    )


@dataclass(frozen=True)
class JointBatch:
    """What the model is called with in one pass: n train samples, then m validation samples."""

    split: Split
    samples: Samples
    input_shape: torch.Size  # of the model's input

    @property
    def size(self) -> tuple[int, ...]:
        """Return the sizes that the layers' row maps depend on."""
        index = self.samples.index
        return (self.samples.count,) if index is None else tuple(self.input_shape[: index.dim()])


@dataclass(frozen=True)
class Probes:
    """Zeros that change no value of the model, and whose gradients are the results of a backward pass.

    s is the factor that the loop puts on the joint loss, and G the number of micro-batches. s² stands for s
    times the s of the step's first micro-batch.
    """

    # (n, k) each, or (n, T) by position. The gradient is the sum of the dot products of the layers that share
    # the probe, times s² and the row's weight, 1/(n·G) unless given, and divided by m if pairwise. There is one
    # probe for all layers, or with per_layer one for each, in their order. They are separate tensors: indexing one
    # tensor by a number would give every compiled block its own graph.
    dots: list[Tensor]
    scale: Tensor  # (scalar); its gradient is s

    @classmethod
    def make(cls, split: Split, like: Tensor, count: int) -> "Probes":
        """Return `count` probes for dot products, on the device of `like` and in its accumulation dtype."""
        zeros = partial(
            torch.zeros, dtype=accumulation_dtype(like.dtype), device=like.device, requires_grad=True
        )
        return cls([zeros(split.n, split.scores) for _ in range(count)], zeros(()))


@dataclass
class Pass:
    """One forward and backward pass over a joint batch.

    An optimizer step may have several micro-batches, a pass each. The first one has the validation samples.
    Their gradient is kept, by parameter, for the other passes, whose m is 0. With a direction that is given m is
    0 in all of them.
    """

    batch: JointBatch
    each_probe: Probes
    sink: DotProducts
    micro_batches: int  # G
    kept: dict[str, Any]  # directions for the other micro-batches, by parameter
    preconditioners: dict[str, Preconditioner] | None  # by parameter, as `kept`; None: not known yet
    guard: "Guard | None" = None  # at the first step
    weights: Tensor | None = None  # (n,) of the train rows' losses in the loss; None: 1/(n·G) each
    announced: bool = False  # the weights were known before the forward pass
    first: "Pass | None" = None  # of the step's first micro-batch; None: it is this one

    # Recorded in the forward pass.
    uses: dict[int, "Uses"] = field(default_factory=dict)  # by group of layers that share weights
    free: list[tuple["Call", Node]] = field(default_factory=list)  # calls without a sample dimension
    recomputable: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    random_states: list[Any] = field(default_factory=list)  # before the forward pass, for the guard

    # Recorded by the joint loss and in the backward pass.
    bypassed: str | None = None  # a layer whose weight has a gradient that no dot product contains
    joins: list["Join"] = field(default_factory=list)
    watched: RemovableHandle | None = None  # the hook on the losses
    loss_gradients: list[Tensor] = field(default_factory=list)  # (n+m,), one for each backward pass
    prepared: bool = False  # `prepare_gradients` has accepted the results

    __reduce__ = refuse_to_be_copied

    @property
    def split(self) -> Split:
        return self.batch.split

    @property
    def samples(self) -> Samples:
        return self.batch.samples

    @property
    def input_shape(self) -> torch.Size:
        return self.batch.input_shape

    @property
    def probes(self) -> list[Tensor]:
        return self.each_probe.dots

    @property
    def scale_probe(self) -> Tensor:
        return self.each_probe.scale

    def row_weights(self) -> Tensor:
        """Return the weight of each row's loss in the joint loss, (n+m,).

        It is the given one, or 1/(n·G), for train rows and 1/m for validation rows.

        Raises:
            ValueError: no weights were given, and another number of rows than in the first micro-batch.
        """
        n, m = self.split.n, self.split.m
        weights = self.scale_probe.detach().new_empty(n + m)
        if self.weights is not None:
            weights[:n] = self.weights
        elif self.first is None or self.first.split.n == n:
            weights[:n] = 1 / (n * self.micro_batches)
        else:
            raise ValueError(
                f"a micro-batch of {n} rows, where the first of its update had {self.first.split.n} train rows: only "
                "the first has the validation rows, too; and rows of micro-batches of unequal size weigh what you say: "
                "give their weights, joint_loss(losses, row_weights)"
            )
        if m > 0:
            weights[n:] = 1 / m
        return weights

    def weigh(self, weights: Tensor) -> None:
        """Set the weights (n,) of the train rows' losses.

        Raises:
            ValueError: another number of weights, or one that is negative or not finite.
        """
        if weights.shape != (self.split.n,):
            raise ValueError(
                f"row_weights needs one weight for each of the pass's {self.split.n} train rows, "
                f"({self.split.n},); got {tuple(weights.shape)}"
            )
        require(
            ((weights >= 0) & weights.isfinite()).all(),
            "row_weights must be finite and not negative: a row with a negative weight would be unlearned, and its "
            "value would not be that of training on it.",
        )
        self.weights = weights.detach().to(self.scale_probe)

    def probed_dots(self, first: "Pass") -> Tensor:
        """Return the dot products that the backward pass left in the probes, without the factors on the loss.

        Args:
            first: the pass of the step's first micro-batch.

        Returns:
            (n, k), or (n, L) per layer, or (n, T) by position; divided by m if pairwise. NaN for a row of weight zero,
            whose gradient the pass does not have.
        """
        scale, first_scale = self.scale_probe.grad, first.scale_probe.grad
        assert scale is not None and first_scale is not None
        if self.split.given:
            first_scale = torch.ones_like(scale)
        columns = [torch.zeros_like(probe) if probe.grad is None else probe.grad for probe in self.probes]
        dots, scales = torch.cat(columns, dim=1), scale * first_scale
        if self.weights is None:
            return dots * (self.split.n * self.micro_batches) / scales
        return dots / (self.weights[:, None] * scales)

    def end_forward(self) -> None:
        """Drop the links between uses, which would form a reference cycle with the graph."""
        for uses in self.uses.values():
            uses.link = None

    def remove_joins(self) -> None:
        """Remove the hooks on the joins, which hold the graph."""
        for join in self.joins:
            join.remove()
        self.joins = []

    def keep(self, parameter: str) -> Keep | None:
        """Return where the direction of a parameter is kept; None if the validation rows are in every pass."""
        if self.micro_batches == 1 and not self.split.given:
            return None
        return Keep(self.kept, parameter, first=self.split.m > 0)

    def remember(self, output: Tensor, made: "Recomputable") -> None:
        """Record how to recompute an output, for as long as it exists.

        In compiled code nothing is recorded: the compiler decides what to recompute.
        """
        if not torch.compiler.is_compiling():
            self.recomputable[output] = made

    def recomputable_input(self, x: Tensor) -> "Recomputable | None":
        """Return how to recompute x; None if that is unknown, or x was changed in place since."""
        if torch.compiler.is_compiling():
            return None
        made: Recomputable | None = self.recomputable.get(x)
        return made if made is not None and made.version == x._version else None


class CurrentPass:
    """The current pass and its phase, shared by the engine and its layers."""

    def __init__(self) -> None:
        self.pass_: Pass | None = None
        # "forward": the model's forward runs.
        # "backward": from the first gradient to `prepare_gradients`. A layer that runs now is recomputed by
        #     activation checkpointing. That is not a second call.
        # "idle": at all other times. No layer may run with gradients.
        self.phase: Literal["idle", "forward", "backward"] = "idle"
        self.autocast: torch.dtype | None = None  # of the last forward pass
        self.gradients_autocast: torch.dtype | None = None  # of the pass that made the last gradients
        self.paused = False  # the model runs as without an engine

    @property
    def rehearsing(self) -> bool:
        """Return True during one of the guard's own forward passes."""
        return self.pass_ is not None and self.pass_.guard is not None and self.pass_.guard.rehearsing
