"""Define the methods that step_time.py compares. Each runs a training step on the same weights and rows.

hf_n, hf_nm            the ordinary Hugging Face model, one training step on n and on n+m rows
regular_n, regular_nm  this repository's method Regular, likewise
graddotprod            method GradDotProd: a training step on n rows, and the dot products with m rows
gram, project, instantiate   graddotprod with one contraction strategy forced on every layer
regular_nm_eager, graddotprod_eager   these two methods without compiling, when --compile is given
pairwise, per_layer    graddotprod with the full matrix of scores, or with a score for each layer
token                  graddotprod with a score for each position
adamw                  graddotprod with AdamW's direction; its factor is 1, so the numbers are the same
loop                   the dot products from one backward pass per row
vmap                   the dot products from torch.func's per-sample gradients
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostEngines import GradDotProdEngine
from model_setup import freeze, set_up_blocks
from models.architectures import ARCHITECTURES, architecture_config
from models.causal_lm import CausalLM, blocks_of

ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "graddotprod": {},
    "gram": {"strategy": "gram"},
    "project": {"strategy": "project"},
    "instantiate": {"strategy": "instantiate"},
    "pairwise": {"granularity": "pairwise"},
    "per_layer": {"granularity": "per_layer"},
    "token": {"granularity": "token"},
    "adamw": {"direction": "auto"},
}
EAGER = {"regular_nm_eager": "regular_nm", "graddotprod_eager": "graddotprod"}
METHODS = ("hf_n", "hf_nm", "regular_n", "regular_nm", *ENGINE_OPTIONS, *EAGER, "loop", "vmap")


@dataclass
class Setup:
    """The weights and rows that all methods share."""

    hf: PreTrainedModel
    ours: CausalLM  # with the same weights as hf
    x: Tensor  # (n+m, T) train rows first
    y: Tensor  # (n+m, T)
    images: Tensor | None  # (n+m, 3, height, width), of a model that takes images
    n: int
    m: int
    autocast: Callable[[], torch.autocast]
    args: argparse.Namespace

    @classmethod
    def make(cls, args: argparse.Namespace) -> "Setup":
        """Make random weights and rows."""
        torch.manual_seed(0)
        family, config = ARCHITECTURES[args.architecture], architecture_config(args.architecture)
        ours = CausalLM(family.model(config))
        plain = architecture_config(args.architecture)
        if plain.model_type == "gpt2":
            plain.activation_function = "gelu_new"  # what Hugging Face's GPT-2 runs
        hf = family.model(plain)
        hf.load_state_dict(ours.hf.state_dict())
        for model in (hf, ours):
            freeze(model, family)
        set_up_hugging_face(hf, compiled=args.compile, checkpointing=args.activation_checkpointing)
        rows = args.batch_size + args.val_batch_size
        tokens = torch.randint(min(ours.vocabulary, 50257), (rows, args.block_size + 1))
        x, y = tokens[:, :-1], tokens[:, 1:]
        images = None
        if family.images:
            size = config.vision_config.image_size
            images = torch.randn(rows, 3, size, size).to(args.device)
            x = x.clone()
            x[:, : config.image_seq_length] = config.image_token_index

        def autocast() -> torch.autocast:
            return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")

        return cls(
            hf.to(args.device).train(),
            ours.to(args.device).train(),
            x.to(args.device),
            y.to(args.device),
            images,
            args.batch_size,
            args.val_batch_size,
            autocast,
            args,
        )

    def inputs(self, rows: slice) -> tuple[Tensor, ...]:
        """Return what our model is called with."""
        every = (self.x, self.y) if self.images is None else (self.x, self.y, self.images)
        return tuple(each[rows] for each in every)

    def hf_inputs(self, rows: slice) -> dict[str, Any]:
        """Return what Hugging Face's model is called with."""
        pixels = {} if self.images is None else {"pixel_values": self.images[rows]}
        return {"input_ids": self.x[rows], "use_cache": False, **pixels}

    def own_model(self, name: str) -> CausalLM:
        """Return new modules around the shared parameters, for one method to attach to and to compile."""
        model = copy.deepcopy(self.ours, {id(parameter): parameter for parameter in self.ours.parameters()})
        compiled, checkpointing = self.args.compile and name not in EAGER, self.args.activation_checkpointing
        set_up_blocks(model, compiled=compiled, checkpointing=checkpointing)
        return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_up_hugging_face(hf: PreTrainedModel, *, compiled: bool, checkpointing: bool) -> None:
    """Compile the blocks, and checkpoint their activations, as asked."""
    if checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    for block in blocks_of(hf) if compiled else ():
        block.compile()


@dataclass
class Method:
    """One way to run a step."""

    model: nn.Module  # has the training gradient after a step
    step: Callable[[], Tensor | None]  # runs a step; returns the dot products, or None for plain training
    rows: slice  # that the training gradient is of


def compute_hf_loss(setup: Setup, rows: slice) -> Tensor:
    with setup.autocast():
        logits = setup.hf(**setup.hf_inputs(rows)).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), setup.y[rows].flatten())


def make_hf(setup: Setup, rows: slice) -> Callable[[], None]:
    def step() -> None:
        compute_hf_loss(setup, rows).backward()

    return step


def make_regular(setup: Setup, model: nn.Module, rows: slice) -> Callable[[], None]:
    def step() -> None:
        with setup.autocast():
            losses = model(*setup.inputs(rows))
        losses.mean().backward()

    return step


def make_engine(setup: Setup, model: nn.Module, **options: Any) -> Callable[[], Tensor]:
    """Attach the engine to a model and return its step. options: of GradDotProdEngine."""
    engine = GradDotProdEngine(model, setup.m, **options)
    optimizer = torch.optim.AdamW(trained(model), lr=0.0, betas=(0.0, 0.95), eps=1.0, fused=True)
    if engine.direction == "auto":  # after a step with zero gradients it divides by sqrt(0) + 1
        for parameter in trained(model):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    engine.attach(optimizer)

    def step() -> Tensor:
        with setup.autocast():
            losses = model(*setup.inputs(slice(None)))
        engine.joint_loss(losses).backward()
        engine.prepare_gradients()
        return engine.dot_products()

    return step


def make_loop(setup: Setup) -> Callable[[], Tensor]:
    """Return a step of one backward pass per row: first the validation rows, then the train rows."""
    parameters = trained(setup.hf)

    def step() -> Tensor:
        n, m = setup.n, setup.m
        total = [torch.zeros_like(p) for p in parameters]
        direction = [torch.zeros_like(p) for p in parameters]
        dots = []
        for row in [*range(n, n + m), *range(n)]:
            gradients = torch.autograd.grad(compute_hf_loss(setup, slice(row, row + 1)), parameters)
            if row >= n:
                torch._foreach_add_(direction, gradients, alpha=1 / m)
            else:
                products = [
                    torch.dot(g.flatten(), d.flatten()) for g, d in zip(gradients, direction, strict=True)
                ]
                dots.append(sum(products, start=torch.zeros_like(products[0])))
                torch._foreach_add_(total, gradients, alpha=1 / n)
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        return torch.stack(dots)

    return step


def make_vmap(setup: Setup) -> Callable[[], Tensor]:
    """Return a step that computes all rows' gradients at once by torch.func: n+m times the model in memory."""
    parameters = {name: p.detach() for name, p in setup.hf.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with setup.autocast():
            logits = torch.func.functional_call(setup.hf, weights, (x[None],), {"use_cache": False}).logits[0]
        return nn.functional.cross_entropy(logits.float(), y)

    gradients_of = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def step() -> Tensor:
        gradients = gradients_of(parameters, setup.x, setup.y)
        dots = torch.zeros(setup.n, device=setup.x.device)
        for name, parameter in setup.hf.named_parameters():
            rows = gradients.pop(name).flatten(1)
            dots += rows[: setup.n] @ rows[setup.n :].mean(0)
            parameter.grad = rows[: setup.n].mean(0).view_as(parameter)
        return dots

    return step


def make_methods(setup: Setup, names: list[str]) -> dict[str, Method]:
    train, both = slice(0, setup.n), slice(0, setup.n + setup.m)
    methods = {}
    for name in names:
        kind = EAGER.get(name, name)
        if kind in ("hf_n", "hf_nm"):
            rows = train if kind == "hf_n" else both
            methods[name] = Method(setup.hf, make_hf(setup, rows), rows)
        elif kind in ("regular_n", "regular_nm"):
            rows, model = train if kind == "regular_n" else both, setup.own_model(name)
            methods[name] = Method(model, make_regular(setup, model, rows), rows)
        elif kind in ENGINE_OPTIONS:
            model = setup.own_model(name)
            methods[name] = Method(model, make_engine(setup, model, **ENGINE_OPTIONS[kind]), train)
        else:
            make = make_loop if kind == "loop" else make_vmap
            methods[name] = Method(setup.hf, make(setup), train)
    return methods
