"""The state of one forward and backward pass under the engine, and what a layer's rule sees of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .contraction import Split, Strategy, accumulation_dtype, choose_strategy
from .memory import Keep, Scratch
from .preconditioner import Preconditioner


@dataclass(frozen=True)
class TiedRoute:
    """What the embedding of a tied weight hands to the head through the graph, so that the cross terms come
    back to it.

    With the weight's gradient E from the embedding and H from the head, <E_i + H_i, E_v + H_v> has two cross
    terms. All three tensors are zeros of the accumulation dtype that touch no output; the head returns as
    their gradients

        gathered (k, n, L, d)   H_v at the train rows' tokens, for <E_i, H_v> = Σ_t g_it · H_v[x_it]
        picked (n, U, d)        H_i at the validation rows' tokens, for <H_i, E_v> = Σ_u H_i[u] · E_v[u]
        whole (V, d)            Σ_i H_i, to which the embedding adds its few rows in place, so that the weight
                                gets one gradient, and autograd need not add up two of the weight's size

    train_tokens (n, L) and val_tokens (U,) say which rows of the weight those are.
    """

    gathered: Tensor
    picked: Tensor
    whole: Tensor
    train_tokens: Tensor
    val_tokens: Tensor


@dataclass(frozen=True)
class Normalisation:
    """How a layer norm made its output, so that a linear layer which takes that output need not keep it for
    the backward pass: the norm keeps its own input x already, of the same size.

    dtype and version: of the output as the norm gave it."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    shape: tuple[int, ...]
    eps: float
    dtype: torch.dtype
    version: int


def routed_tensors(route: TiedRoute | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of a route that are in the graph; None thrice for no route."""
    return (None, None, None) if route is None else (route.gathered, route.picked, route.whole)


Granularity = Literal["total", "pairwise", "per_layer"]
Direction = Literal["gradient", "adamw"]
DIRECTIONS: tuple[Direction, ...] = ("gradient", "adamw")
GRANULARITIES: tuple[Granularity, ...] = ("total", "pairwise", "per_layer")


def refuse_to_be_copied(self: object) -> NoReturn:
    raise RuntimeError(
        "a model with an engine attached cannot be copied or pickled, since the copy would have an engine "
        "that nobody could detach: detach it first, or copy the state_dict"
    )


@dataclass
class Step:
    """One pass over a joint batch of n train and m validation rows.

    Of several micro-batches, which make one optimizer step, the first has the validation rows; their gradient
    is kept, by parameter, for the others, whose m is 0.

    probes (n, k) each: zeros; after the backward the gradient of a probe is the sum of the dot products of
    the layers that share it, times s²/(n·G) (s²/(n·m) if pairwise), s being the common factor on the loss and
    G the number of micro-batches (s² is s times the first micro-batch's s). There
    is one for all layers, or with per_layer one for each, in their order: separate tensors, since a tensor
    indexed by a number would give every compiled block a graph of its own. scale_probe (): zero; its gradient
    is s. input_shape: of the model's input. strategy: the one that every weight must use, None for a choice
    by shape. scratch: memory for the contractions. routes: a tied weight's route from its embedding to its
    head, by its name. normalised: outputs of layer norms, and how to make them again. preconditioners: by id
    of the parameter, what the direction is multiplied by; None: by nothing."""

    split: Split
    input_shape: torch.Size
    probes: list[Tensor]
    scale_probe: Tensor
    strategy: Strategy | None
    scratch: Scratch
    micro_batches: int
    kept: dict[str, Any]
    preconditioners: dict[int, Preconditioner] | None = None
    routes: dict[str, TiedRoute] = field(default_factory=dict)
    normalised: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    @classmethod
    def begin(
        cls,
        split: Split,
        input_shape: torch.Size,
        strategy: Strategy | None,
        like: Tensor,
        probes: int,
        scratch: Scratch,
        micro_batches: int,
        kept: dict[str, Any],
        preconditioners: dict[int, Preconditioner] | None,
    ) -> "Step":
        """like: a parameter, for the device and the dtype of accumulation. probes: how many."""
        zeros = partial(
            torch.zeros, dtype=accumulation_dtype(like.dtype), device=like.device, requires_grad=True
        )
        each = [zeros(split.n, split.directions) for _ in range(probes)]
        return cls(
            split, input_shape, each, zeros(()), strategy, scratch, micro_batches, kept, preconditioners
        )

    __reduce__ = refuse_to_be_copied

    def row_weights(self) -> Tensor:
        """(n+m,): the weight of every row's loss in the joint loss, 1/(n·G) for train and 1/m for validation
        rows."""
        n, m = self.split.n, self.split.m
        weights = self.scale_probe.detach().new_full((n + m,), 1 / (n * self.micro_batches))
        if m > 0:
            weights[n:] = 1 / m
        return weights

    def keep(self, owner: str, parameter: str) -> Keep | None:
        """Where the direction of a layer's (or a tie's) parameter is kept; None for a single batch."""
        if self.micro_batches == 1:
            return None
        return Keep(self.kept, f"{owner}.{parameter}", first=self.split.m > 0)

    def remember_normalisation(self, output: Tensor, made: Normalisation) -> None:
        """For as long as the output lives. A compiler decides by itself what is made again."""
        if not torch.compiler.is_compiling():
            self.normalised[output] = made

    def normalisation_of(self, x: Tensor) -> Normalisation | None:
        """How x was made, if it is the output of a layer norm and has not been changed in place since."""
        if torch.compiler.is_compiling():
            return None
        made: Normalisation | None = self.normalised.get(x)
        return made if made is not None and made.version == x._version else None

    def strategy_for(self, positions: int, p: int, d: int) -> Strategy:
        """The strategy for a (p, d) weight whose input has this many positions."""
        return self.strategy or choose_strategy(self.split, positions, p, d, self.by_direction)

    @property
    def by_direction(self) -> bool:
        """Whether the direction itself is needed, which not every strategy makes."""
        return self.micro_batches > 1 or self.preconditioners is not None


class CurrentStep:
    """Where the layers find the step under way.

    phase: "forward" while the model's forward runs, "backward" from the first gradient to
    `prepare_gradients`: a layer that runs then is being recomputed by activation checkpointing, which is not
    a second call. "idle" at all other times, when no layer may run with gradients."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.phase: Literal["idle", "forward", "backward"] = "idle"


class LayerStep:
    """The step as one layer's rule sees it.

    name: the layer's name in the model. rule: how the layer runs under the engine. tied: the name of the tie
    that its weight belongs to, or None. calls: how often the layer ran in the forward pass under way."""

    def __init__(
        self, layer: nn.Module, name: str, rule: Callable[..., Tensor], tied: str | None, current: CurrentStep
    ) -> None:
        self.layer, self.name, self.rule, self.tied = layer, name, rule, tied
        self.calls = 0
        self.probe: Tensor  # (n, k), laid out at the beginning of each step
        self._current = current

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        """What stands in the place of the layer's forward while the engine is attached; without gradients it
        is the layer's own.

        A bound method, not a closure: `torch.compile` guards on the function and the type of its object,
        which all blocks have in common, and so one graph serves them all."""
        if not torch.is_grad_enabled():
            return type(self.layer).forward(self.layer, *inputs, **named_inputs)
        return self.rule(self.layer, self, *inputs, **named_inputs)

    __reduce__ = refuse_to_be_copied

    @property
    def step(self) -> Step:
        step = self._current.step
        if step is None or self._current.phase == "idle":
            raise RuntimeError(
                f"layer '{self.name}' ran outside of the model that the engine is attached to: call the "
                "model itself (or the DDP or FSDP wrapper around it), or detach the engine first."
            )
        return step

    def enter(self, x: Tensor) -> Step:
        """Counts this call and returns the step.

        Raises ValueError unless the first dimension of the layer's input x is the sample, RuntimeError
        outside of a step."""
        step = self.step
        if self._current.phase == "forward":
            self.calls += 1
        rows = step.split.n + step.split.m
        if x.dim() == 0 or x.shape[0] != rows:
            raise ValueError(
                f"layer '{self.name}' got an input of shape {tuple(x.shape)}, but the model's input has "
                f"{rows} rows ({step.split.n} train, {step.split.m} validation): the first dimension of "
                "every covered layer's input must be the sample. Keep the batch first and flatten nothing "
                "into it, or freeze the layer's parameters."
            )
        if x.dim() == 1 and rows in step.input_shape[1:]:
            raise ValueError(
                f"layer '{self.name}' got an input of shape {tuple(x.shape)}, which may be one entry for "
                f"each of the {rows} rows of the model's input, or for each of its {rows} columns: expand "
                f"it to ({rows}, ...), or use another number of rows."
            )
        return step

    def keep(self, parameter: str) -> Keep | None:
        """Where the direction of this layer's parameter is kept; one place for both ends of a tie."""
        owner = self.tied if parameter == "weight" and self.tied is not None else self.name
        return self.step.keep(owner, parameter)

    def preconditioner(self, parameter: str) -> Preconditioner | None:
        """What this parameter's direction is multiplied by, None for nothing."""
        preconditioners, trained = self.step.preconditioners, getattr(self.layer, parameter)
        if preconditioners is None or trained is None or not trained.requires_grad:
            return None
        if id(trained) not in preconditioners:
            raise RuntimeError(
                f"'{self.name}' has no second moment for its {parameter}: it had no gradient when the other "
                'parameters got theirs, and direction "adamw" cannot weigh it; use direction "gradient"'
            )
        return preconditioners[id(trained)]

    def take_route(self) -> TiedRoute | None:
        """The route laid by the embedding that shares this head's weight; None for a weight of the head's
        own."""
        if self.tied is None:
            return None
        if self.tied not in self.step.routes:
            raise RuntimeError(
                f"layer '{self.name}' shares its weight with an embedding that has not run in this forward "
                "pass: call the embedding first, or untie the weights."
            )
        return self.step.routes[self.tied]
