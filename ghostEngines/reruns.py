"""Rerunning a unit, a whole module, for the gradient of each sample (layer_rules/units.py)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .descriptions import Streamed
from .errors import RowsError
from .layer_rules.units import part_of, rerun, sample_gradients, tensors_of
from .parameters import swapped
from .row_maps import Samples

if TYPE_CHECKING:
    from .tap import Call

Attributes = list[tuple[nn.Module, dict[str, Any]]]


def attributes(layer: nn.Module) -> Attributes:
    """Return the attributes of a module and of the modules in it, without those of PyTorch's own."""
    return [
        (
            module,
            {
                key: value
                for key, value in vars(module).items()
                if not key.startswith("_") and key != "forward"
            },
        )
        for module in layer.modules()
    ]


class Rerun:
    """Run a unit again as it ran in the forward pass, on one sample at a time."""

    def __init__(
        self,
        layer: nn.Module,
        places: Sequence[tuple[nn.Module, str]],
        names: Sequence[str],
        samples: Samples,
        x: Tensor,
        before: Attributes,
    ) -> None:
        """Record how the unit ran.

        Args:
            places: the module and the key of each trainable parameter.
            names: of the last inputs, which were given by keyword.
            x: an input, whose device determines the autocast that is recorded.
            before: the module's attributes before it ran, since it may keep a state in them.
        """
        self.before = before
        self.layer, self.places, self.names, self.samples = layer, places, names, samples
        self.device = x.device.type
        self.autocast = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the module with its attributes and autocast as they were in the forward pass."""
        now = attributes(self.layer)
        for module, values in self.before:
            module.__dict__.update(values)
        try:
            with torch.autocast(self.device, enabled=self.autocast[0], dtype=self.autocast[1]):
                return type(self.layer).forward(self.layer, *inputs, **named)
        finally:
            for module, values in now:
                module.__dict__.update(values)

    def gradients(
        self, call: "Call", inputs: tuple[Any, ...], backprops: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Return the training gradient of each parameter of the unit, and dots (n, k)."""
        parameters = [each.detach().requires_grad_() for each in call.parameters]

        def of_sample(i: int) -> list[Tensor]:
            with swapped(self.places, parameters):
                return sample_gradients(
                    self.forward, parameters, inputs, self.names, backprops, i, self.samples
                )

        assert call.uses is not None
        if call.uses.alone(call.parameters):
            totals, dots = call.sink.together(call.sites, of_sample, self.samples.count)
            return list(totals), dots
        gradients: list[Tensor | None] = []
        every = []
        for number in range(len(parameters)):

            def of_parameter(i: int, number: int = number) -> Tensor:
                return of_sample(i)[number]

            gradient, own_dots = call.take(number, Streamed(of_parameter, self.samples.count))
            gradients.append(gradient)
            if own_dots is not None:
                every.append(own_dots)
        return gradients, torch.stack(every).sum(0) if every else None

    def check(self, inputs: Sequence[Any], output: Any, name: str) -> None:
        """Raise RowsError unless the module's output for a row is the same alone and among the other rows."""
        with torch.no_grad():
            for i in (0, self.samples.count - 1):
                alone = rerun(self.forward, inputs, self.names, i, self.samples)
                for own, among in zip(alone, tensors_of(output), strict=True):
                    want = part_of(among, i, self.samples)
                    tolerance = 100 * torch.finfo(own.dtype).eps
                    if own.shape != want.shape or not torch.allclose(
                        own, want, rtol=tolerance, atol=tolerance * want.abs().max().item(), equal_nan=True
                    ):
                        raise RowsError(
                            f"module '{name}', taken as one layer, gives a row another output alone than among the "
                            "other rows: it cannot be run again row by row. Freeze its parameters."
                        )
