"""The validation gradient from a pass of its own, at the model's parameters or at others."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .contraction import accumulation_dtype
from .own_passes import NO_DERIVATIVE, Losses, check_undivided, own_pass, per_sample, widened
from .updates import Member, Updates

# Entries of a parameter that are in work at a time: few, so that they stay in a CPU's cache, and that PyTorch does not
# divide an operation among threads, which would wait for each other after each of many where a core is busy.
CHUNK = 1 << 15
GPU_CHUNK = 1 << 24  # on a GPU each call has a cost


Combine = Callable[[str, Tensor, Tensor], Tensor]
"""Returns new memory, given a parameter's name, the total so far and the gradient."""


class ValidationGradient:
    """The sum of validation gradients at several points, by name of the parameter, in the accumulation dtype.

    Args:
        model: no parameter of it is changed.

    Raises:
        AttachError: parameters that are divided among processes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        check_undivided(model, "a validation gradient of its own")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.total = {
            name: p.new_zeros(p.shape, dtype=accumulation_dtype(p.dtype)) for name, p in trained.items()
        }
        # Scalars in float64: the norm of the last gradient that was added, and its product with those before.
        self.norm = self.product = torch.zeros((), dtype=torch.float64)

    def add(
        self, losses: Losses, at: Mapping[str, Tensor] | None = None, combine: Combine | None = None
    ) -> Tensor:
        """Add the gradient of the mean loss at some values of the parameters, and return that loss (scalar).

        Args:
            losses: calls the model on the validation rows.
            at: by name; None: the parameters themselves.
            combine: makes of the total of a parameter and its gradient here what the total becomes; None: their sum.

        Raises:
            RuntimeError: the losses do not depend on the model's parameters.
        """
        leaves, measured = widened(self.model, at), _Measured(combine)
        for name, total in self.total.items():
            leaves[name].requires_grad_()
            leaves[name].grad = total  # the backward pass adds to it in place
            leaves[name].register_hook(partial(measured.add, name, total))
        with torch.enable_grad(), own_pass(self.model, leaves):
            found = per_sample(losses)
            if found.requires_grad:
                found.mean().backward()
        if not measured.squares:
            raise RuntimeError(
                f"the validation losses have no derivative by the model's parameters: {NO_DERIVATIVE}"
            )
        for name in self.total:
            gradient = leaves[name].grad
            assert gradient is not None
            self.total[name] = gradient
        self.norm = torch.stack(measured.squares).sum().sqrt()
        self.product = torch.stack(measured.products).sum()
        return found.detach().double().mean()


class _Measured:
    """Squares of gradients and their products with those before, by parameter."""

    def __init__(self, combine: Combine | None) -> None:
        self.products: list[Tensor] = []
        self.squares: list[Tensor] = []
        self._combine = combine

    def add(self, name: str, before: Tensor, gradient: Tensor) -> Tensor | None:
        """Return what autograd is to add to the total; None: the gradient itself."""
        self.products.append(torch.dot(before.flatten(), gradient.flatten()).double())
        self.squares.append(torch.dot(gradient.flatten(), gradient.flatten()).double())
        if self._combine is None:
            return None
        with (
            torch.no_grad()
        ):  # not by a difference that autograd adds: it would cost small results their digits
            before.copy_(self._combine(name, before, gradient))
            return torch.zeros_like(gradient)


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

    A parameter in half precision goes where it can: the point is rounded as the parameter will be.

    Args:
        with_gradients: the update of the `.grad` that are there; False: of gradients of zero, the look-ahead point.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for member in updates.moved() if with_gradients else updates.members():
        parameter = member.parameter
        after = parameter.new_empty(parameter.shape, dtype=accumulation_dtype(parameter.dtype))
        for part, own, some in entries(member, parameter.grad if with_gradients else None):
            update = updates.rule.update(some.group, some.state, some.parameter, own)
            way = (update.step() if with_gradients else update.idle()) + update.decay()
            torch.sub(some.parameter, way, alpha=float(some.group["lr"]), out=after.view(-1)[part])
        if with_gradients:
            after = after.to(parameter.dtype).to(after.dtype)
        found[names[id(parameter)]] = after
    return found
