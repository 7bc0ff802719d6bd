"""Covered layers while the engine is attached: each runs its own forward, with a tap on the output."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .layer_rules.registry import LayerRule
from .layer_rules.units import tensors_of
from .parameters import swapped
from .passes import CurrentPass, Pass, refuse_to_be_copied
from .precision import compute_dtype
from .reruns import Rerun, attributes
from .row_maps import ROWS, RowMap
from .sinks import Site
from .tap import KEPT, Call, Recomputable, Tap
from .uses import Uses

RowMapMaker = Callable[[tuple[Any, ...], int], RowMap]
"""(inputs of a layer's call, number of samples) -> row map of its first input."""


def own_parameters(layer: nn.Module, rule: LayerRule) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the name in the layer, the module and the key there of each parameter that the rule covers."""
    modules = layer.named_modules() if rule.whole else [("", layer)]
    for prefix, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{key}" if prefix else key), module, key


def _of(place: tuple[str, nn.Module, str]) -> Tensor:
    """Return the parameter at a place that `own_parameters` yields."""
    _, module, key = place
    parameter = module._parameters[key]
    assert parameter is not None
    return parameter


def _in_place_of(output: Any, tapped: list[Tensor]) -> Any:
    """Return the module's output with its floating-point tensors replaced."""
    new = iter(tapped)
    each = [next(new) if isinstance(o, Tensor) and o.is_floating_point() else o for o in output]
    return type(output)(each)


class TappedLayer:
    """One covered layer."""

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        rule: LayerRule,
        group: int,
        owners: dict[str, str],
        current: CurrentPass,
        row_map: RowMapMaker | None = None,
    ) -> None:
        """Prepare a layer's tap.

        Args:
            name: in the model.
            group: the number that this layer has in common with the layers that share parameters with it.
            owners: by name of the parameter in the layer, the name under which its direction is kept. All
                uses of a parameter have one such name.
        """
        self.layer, self.name, self.rule, self.group, self.owners = layer, name, rule, group, owners
        self.calls = 0  # in the current forward pass
        self.probe: Tensor  # (n, k), new in each pass
        self._current = current
        self._row_map = row_map

    __reduce__ = refuse_to_be_copied

    def attach(self) -> None:
        """Replace the layer's forward."""
        self.layer.forward = self.forward

    def detach(self) -> None:
        """Restore the layer's own forward."""
        vars(self.layer).pop("forward")

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Run the layer and, with gradients, tap its output.

        This is a bound method and not a closure: `torch.compile` guards on the function and on the type of
        its object. All blocks have these in common, so one graph serves them all.
        """
        if not torch.is_grad_enabled() or self._current.paused:
            return type(self.layer).forward(self.layer, *inputs, **named_inputs)
        if self.rule.run is not None:
            return self.rule.run(self.layer, self, *inputs, **named_inputs)
        return self._tapped(inputs, named_inputs)

    def _tapped(self, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> Any:
        """Run the layer with its parameters detached and put the tap on its output."""
        pass_, layer, rule = self.pass_, self.layer, self.rule
        trainable = [each for each in own_parameters(layer, rule) if _of(each).requires_grad]
        parameters = [_of(each) for each in trainable]
        places = [(module, key) for _, module, key in trainable]
        arguments = (*inputs, *named_inputs.values())
        x = arguments[0]
        row_map = self.enter(x, arguments)
        made = None
        if rule.product:
            made = pass_.recomputable_input(x)
            if made is not None and pass_.guard is not None:
                self._check_made(made, x)
            dtype = compute_dtype(x)
            if x.dtype != dtype:
                x = x.to(dtype)  # cast here, so that autograd keeps this copy
            arguments = (x, *arguments[1:])
            inputs = (x, *inputs[1:]) if inputs else inputs
            named_inputs = named_inputs if inputs else dict(zip(named_inputs, arguments, strict=True))
        before = attributes(layer) if rule.unit else []
        with swapped(places, [each.detach() for each in parameters]):
            output = type(layer).forward(layer, *inputs, **named_inputs)
        if not parameters:
            return output
        call = Call(
            layer,
            rule,
            tuple(name for name, _, _ in trainable),
            tuple(self.site(name, each) for (name, _, _), each in zip(trainable, parameters, strict=True)),
            pass_.sink,
            ROWS if row_map is None else row_map,
            tuple(KEPT if isinstance(each, Tensor) else each for each in arguments),
            made,
            None if made is None else x.dtype,
        )
        kept = tuple(each.detach() for each in arguments if isinstance(each, Tensor))
        if made is not None:
            kept = made.kept
        link = None
        if not torch.compiler.is_compiling():
            link = self._enter_uses(pass_, call, parameters, row_map, arguments[0])
            if rule.unit:
                call.rerun = Rerun(layer, places, tuple(named_inputs), pass_.samples, x, before)
            if pass_.guard is not None:
                self._check_call(call, arguments, output)
        elif rule.unit or row_map is None or pass_.samples.index is not None:
            raise RuntimeError(
                f"layer '{self.name}' runs in compiled code, and its rule, or samples that are not rows, need more "
                "than plain mathematics: leave its block uncompiled"
            )
        outputs = [output] if isinstance(output, Tensor) else tensors_of(output)
        *tapped, link = Tap.apply(call, self.probe, link, len(outputs), *outputs, *parameters, *kept)
        if call.uses is not None:
            call.uses.link = link
        if rule.again:
            pass_.remember(tapped[0], Recomputable.of(layer, arguments[0], parameters, tapped[0]))
        if call.free:
            pass_.free.append((call, tapped[0].grad_fn))
        return tapped[0] if isinstance(output, Tensor) else _in_place_of(output, tapped)

    def _check_made(self, made: Recomputable, x: Tensor) -> None:
        """Check at the first step that the input is what its norm would recompute."""
        with torch.no_grad():
            if not torch.equal(made.run(made.kept[0]), x):
                raise RuntimeError(
                    f"the input of layer '{self.name}' is not what the norm before it gave: it was changed in a way "
                    "that autograd does not see (through .data). Change it by an ordinary operation."
                )

    def _check_call(self, call: Call, arguments: tuple[Any, ...], output: Any) -> None:
        """Check at the first step that the layer computes what its rule assumes."""
        if call.rerun is not None:
            call.rerun.check(arguments, output, self.name)
        if self.rule.expected is not None and not call.recomputed:
            with torch.no_grad():  # a checkpoint counts the tensors that autograd keeps
                want = self.rule.expected(self.layer, arguments)
                error, largest = (output - want).abs().max(), want.abs().max()
            precision = max(torch.finfo(t.dtype).eps for t in (arguments[0], output) if t.is_floating_point())
            if not error <= max(50 * precision, 1e-5) * largest:
                raise RuntimeError(
                    f"layer '{self.name}' of type {type(self.layer).__name__} does not do with its input what "
                    "it did with the random ones by which its rule was found: write a rule for it (register_rule)"
                )

    def _enter_uses(
        self, pass_: Pass, call: Call, parameters: list[Tensor], row_map: RowMap | None, x: Tensor
    ) -> Tensor | None:
        """Fill in what a call needs outside of compiled code.

        Returns:
            The link of the use before it; None if there is none.
        """
        call.parameters, call.name, call.guard = tuple(parameters), self.name, pass_.guard
        call.free = row_map is None
        call.checkpointed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if self._current.phase != "forward":  # recomputed by checkpointing, only for what autograd keeps
            call.free, call.recomputed = False, True
            return None
        call.uses = pass_.uses.setdefault(self.group, Uses())
        tokens = None
        if self.rule.lookup:
            count = pass_.samples.count
            rows = x.expand(count, *x.shape) if row_map is None else row_map.to_rows(x)
            tokens = rows.reshape(count, -1)
        call.position = call.uses.enter(parameters, tokens)
        return call.uses.link

    @property
    def pass_(self) -> Pass:
        """Return the current pass. Raises RuntimeError outside of one."""
        pass_ = self._current.pass_
        if pass_ is None or self._current.phase == "idle":
            raise RuntimeError(
                f"layer '{self.name}' ran outside of the model that the engine is attached to: call the "
                "model itself (or the DDP or FSDP wrapper around it), or detach the engine first."
            )
        return pass_

    def parameters(self) -> list[Tensor]:
        """Return the parameters that the layer's rule covers."""
        return [_of(place) for place in own_parameters(self.layer, self.rule)]

    def enter(self, x: Tensor, arguments: tuple[Any, ...]) -> RowMap | None:
        """Count this call and return the row map of its input x; None if x has no sample dimension.

        Raises:
            ValueError: it is unknown where the entries of x belong.
            RuntimeError: outside of a pass.
        """
        pass_ = self.pass_
        if self._current.phase == "forward":
            self.calls += 1
        samples = pass_.samples
        if self._row_map is not None:
            return self._row_map(arguments, samples.count)
        rows = samples.rows
        if (
            x.dim() == 1
            and x.shape[0] == rows > 1
            and rows in pass_.input_shape[1:]
            and not samples.of_positions
        ):
            raise ValueError(
                f"layer '{self.name}' got an input of shape {tuple(x.shape)}, which may be one entry for "
                f"each of the {rows} rows of the model's input, or for each of its {rows} columns: expand "
                f"it to ({rows}, ...), or use another number of rows."
            )
        row_map = samples.row_map(x.shape)
        if row_map is None and samples.of_positions and x.dim() > 2 and x.shape[0] == rows:
            assert samples.index is not None
            raise ValueError(
                f"layer '{self.name}' got an input of shape {tuple(x.shape)}, with the rows of the model's input but "
                f"not their positions {tuple(samples.index.shape)}, of which the samples are made: name where its "
                "entries belong with row_maps, or freeze its parameters"
            )
        return row_map

    def site(self, name: str, parameter: Tensor) -> Site:
        """Return what the sink needs to know of a parameter in this pass."""
        pass_ = self.pass_
        keep, preconditioner = pass_.keep(self.owners[name]), None
        if pass_.preconditioners and (keep is None or keep.first):
            if self.owners[name] not in pass_.preconditioners:
                raise RuntimeError(
                    f"'{self.name}' has no second moment for its {name}: it had no gradient when the other "
                    'parameters got theirs, and direction "auto" cannot weigh it; use direction "gradient"'
                )
            preconditioner = pass_.preconditioners[self.owners[name]]
        return Site(parameter.shape, keep, preconditioner)


class TappedParameters(TappedLayer):
    """A module whose own parameters no rule covers.

    Each parameter has a tap of its own, wherever the module's forward uses it. The gradient of each sample is
    computed at the operation where the parameter meets the samples (joins.py).
    """

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Run the module with its parameters tapped."""
        if not torch.is_grad_enabled() or self._current.paused:
            return type(self.layer).forward(self.layer, *inputs, **named_inputs)
        pass_ = self.pass_
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"module '{self.name}' of type {type(self.layer).__name__} has parameters that no rule covers, "
                "and they are followed in uncompiled code only: leave its block uncompiled"
            )
        if self._current.phase == "forward":
            self.calls += 1
        trainable = [each for each in own_parameters(self.layer, self.rule) if _of(each).requires_grad]
        tapped = []
        for name, module, key in trainable:
            parameter = _of((name, module, key))
            call = Call(
                self.layer,
                self.rule,
                (name,),
                (self.site(name, parameter),),
                pass_.sink,
                ROWS,
                (),
                None,
                None,
            )
            alone = ROWS if pass_.samples.count == 1 else None
            link = self._enter_uses(pass_, call, [parameter], alone, parameter)
            output, link = Tap.apply(call, self.probe, link, 1, parameter.detach(), parameter)
            if call.uses is not None:
                call.uses.link = link
            if call.free:
                pass_.free.append((call, output.grad_fn))
            tapped.append(output)
        with swapped([(module, key) for _, module, key in trainable], tapped):
            return type(self.layer).forward(self.layer, *inputs, **named_inputs)
