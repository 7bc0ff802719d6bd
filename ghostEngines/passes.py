"""The state of one forward and backward pass under the engine."""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.weak import WeakTensorKeyDictionary

from .contraction import Split, accumulation_dtype
from .memory import Keep
from .preconditioner import Preconditioner
from .row_maps import Samples
from .sinks import DotProducts

if TYPE_CHECKING:
    from .guard import Guard
    from .tap import Call, Recomputable
    from .uses import Uses

Direction = Literal["gradient", "adamw"]
DIRECTIONS: tuple[Direction, ...] = ("gradient", "adamw")


def refuse_to_be_copied(self: object) -> NoReturn:
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
        """The sizes that the layers' row maps depend on."""
        index = self.samples.index
        return (self.samples.count,) if index is None else tuple(self.input_shape[: index.dim()])


@dataclass(frozen=True)
class Probes:
    """Zeros that touch no value of the model, and whose gradients are the results of a backward pass.

    s is the factor that the loop puts on the joint loss, G the number of micro-batches; s² is s times the s of the
    step's first micro-batch.
    """

    # (n, k) each. The gradient is the sum of the dot products of the layers that share the probe, times s²/(n·G),
    # or s²/(n·m) if pairwise. One probe for all layers, or with per_layer one for each, in their order. They are
    # separate tensors: one tensor, indexed by a number, would give every compiled block a graph of its own.
    dots: list[Tensor]
    scale: Tensor  # (scalar); its gradient is s

    @classmethod
    def make(cls, split: Split, like: Tensor, count: int) -> "Probes":
        """Return `count` probes of dot products on the device of `like`, in its dtype of accumulation."""
        zeros = partial(
            torch.zeros, dtype=accumulation_dtype(like.dtype), device=like.device, requires_grad=True
        )
        return cls([zeros(split.n, split.directions) for _ in range(count)], zeros(()))


@dataclass
class Pass:
    """One forward and backward pass over a joint batch.

    Of several micro-batches, which make one optimizer step, the first has the validation samples. Their gradient is
    kept, by parameter, for the others, whose m is 0.
    """

    batch: JointBatch
    each_probe: Probes
    sink: DotProducts
    micro_batches: int  # G
    kept: dict[str, Any]  # directions for the other micro-batches, by parameter
    preconditioners: dict[int, Preconditioner] | None  # by id of the parameter; None: the gradient itself
    uses: dict[int, "Uses"] = field(default_factory=dict)  # by group of layers that share weights
    free: list[tuple["Call", Node]] = field(default_factory=list)  # calls without a sample dimension
    recomputable: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    guard: "Guard | None" = None  # at the first step

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

    __reduce__ = refuse_to_be_copied

    def row_weights(self) -> Tensor:
        """Return the weight of every row's loss in the joint loss (n+m,): 1/(n·G) for train and 1/m for
        validation rows."""
        n, m = self.split.n, self.split.m
        weights = self.scale_probe.detach().new_full((n + m,), 1 / (n * self.micro_batches))
        if m > 0:
            weights[n:] = 1 / m
        return weights

    def end_forward(self) -> None:
        """Let go of the links between uses: they hold the graph, which holds the uses."""
        for uses in self.uses.values():
            uses.link = None

    def keep(self, parameter: str) -> Keep | None:
        """Return where the direction of a parameter is kept; None for a single batch."""
        if self.micro_batches == 1:
            return None
        return Keep(self.kept, parameter, first=self.split.m > 0)

    def remember(self, output: Tensor, made: "Recomputable") -> None:
        """Remember how an output was made, for as long as it lives. A compiler decides by itself what is recomputed."""
        if not torch.compiler.is_compiling():
            self.recomputable[output] = made

    def recomputable_input(self, x: Tensor) -> "Recomputable | None":
        """Return how x was made, if its layer can recompute it and it has not been changed in place since."""
        if torch.compiler.is_compiling():
            return None
        made: Recomputable | None = self.recomputable.get(x)
        return made if made is not None and made.version == x._version else None


class CurrentPass:
    """Where the layers find the step under way.

    phase: "forward" while the model's forward runs, "backward" from the first gradient to
    `prepare_gradients`: a layer that runs then is being recomputed by activation checkpointing, which is not
    a second call. "idle" at all other times, when no layer may run with gradients."""

    def __init__(self) -> None:
        self.pass_: Pass | None = None
        self.phase: Literal["idle", "forward", "backward"] = "idle"
