"""The validation gradient from a pass of its own, at the model's parameters or at others."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .contraction import accumulation_dtype
from .errors import AttachError
from .parameters import replaced
from .update_rules import Member, Updates

# Entries of a parameter that are in work at a time: few, so that they stay in a CPU's cache, and that PyTorch does not
# divide an operation among threads, which would wait for each other after each of many where a core is busy.
CHUNK = 1 << 15
GPU_CHUNK = 1 << 24  # on a GPU each call has a cost

Losses = Callable[[], Tensor]
"""Calls the model and returns its per-sample losses."""


class ValidationGradient:
    """The sum of validation gradients at several points, by name of the parameter, in the accumulation dtype.

    Args:
        model: no parameter of it is changed.

    Raises:
        AttachError: parameters that are divided among processes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if any(isinstance(parameter, DTensor) for parameter in trained.values()):
            raise AttachError(
                "a validation gradient of its own needs whole parameters, and these are divided among processes (FSDP)"
            )
        self.total = {
            name: p.new_zeros(p.shape, dtype=accumulation_dtype(p.dtype)) for name, p in trained.items()
        }
        # Scalars in float64: the norm of the last gradient that was added, and its product with those before.
        self.norm = self.product = torch.zeros((), dtype=torch.float64)

    def add(self, losses: Losses, at: Mapping[str, Tensor] | None = None) -> Tensor:
        """Add the gradient of the mean loss at some values of the parameters, and return that loss (scalar).

        Args:
            losses: calls the model on the validation rows.
            at: by name; None: the parameters themselves.
        """
        products: list[Tensor] = []
        squares: list[Tensor] = []
        leaves = {}
        for name, parameter in self._model.named_parameters():
            values = parameter if at is None or name not in at else at[name]
            leaf = values.detach().to(accumulation_dtype(parameter.dtype))
            if name in self.total:
                leaf.requires_grad_()
                leaf.grad = self.total[name]  # the backward pass adds to it in place

                def measure(gradient: Tensor, before: Tensor = leaf.grad) -> None:
                    products.append(torch.dot(before.flatten(), gradient.flatten()).double())
                    squares.append(torch.dot(gradient.flatten(), gradient.flatten()).double())

                leaf.register_hook(measure)
            leaves[name] = leaf
        with torch.enable_grad(), replaced(self._model, leaves):
            loss = losses().mean()
            loss.backward()
        for name in self.total:
            gradient = leaves[name].grad
            assert gradient is not None
            self.total[name] = gradient
        self.norm, self.product = torch.stack(squares).sum().sqrt(), torch.stack(products).sum()
        return loss.detach()


def entries(member: Member, gradient: Tensor | None) -> Iterator[tuple[slice, Tensor, Member]]:
    """Yield pieces of a parameter: where they lie, their gradient, and the parameter and state there, all flat.

    Args:
        gradient: of the parameter; None: zero.
    """
    parameter, dtype = member.parameter.detach(), accumulation_dtype(member.parameter.dtype)
    flat = {
        key: value.flatten()
        for key, value in member.state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
    }
    values = parameter.flatten()
    gradients = None if gradient is None else gradient.detach().flatten()
    chunk = CHUNK if values.device.type == "cpu" else GPU_CHUNK
    for start in range(0, len(values), chunk):
        part = slice(start, start + chunk)
        some = values[part].to(dtype)
        own = torch.zeros_like(some) if gradients is None else gradients[part].to(dtype)
        state = {**member.state, **{key: value[part].to(dtype) for key, value in flat.items()}}
        yield part, own, Member(some, member.group, state)


@torch.no_grad()
def point_after(model: nn.Module, updates: Updates, *, with_gradients: bool) -> dict[str, Tensor]:
    """Return where the coming update takes the parameters, by name, in new memory. The optimizer is not changed.

    Args:
        with_gradients: the update of the `.grad` that are there; False: of gradients of zero, the look-ahead point.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for member in updates.members():
        gradient = member.parameter.grad
        if with_gradients and gradient is None:  # the optimizer leaves it out
            continue
        parameter = member.parameter
        after = parameter.new_empty(parameter.shape, dtype=accumulation_dtype(parameter.dtype))
        for part, own, some in entries(member, gradient if with_gradients else None):
            update = updates.rule.update(some.group, some.state, some.parameter, own)
            after.view(-1)[part] = some.parameter - some.group["lr"] * (update.step + update.decay)
        found[names[id(member.parameter)]] = after
    return found
