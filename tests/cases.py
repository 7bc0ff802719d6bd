"""Models and data as test cases: every layer rule, alone and in the models it is made for."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from benchmarks.oracle import Truth, per_sample
from ghostEngines import CrossEntropyHead, GradDotProdEngine, per_sample_losses
from models.causal_lm import CausalLM

V, T, D = 17, 6, 8

Model = TypeVar("Model", bound=nn.Module)
Losses = Callable[[Any, Tensor, Tensor], Tensor]


def tiny_gpt2(tied: bool, vocabulary: int = V) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=12,
        n_embd=D,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    for p in model.parameters():  # biases and norms away from their neutral starting values
        nn.init.normal_(p, std=0.3)
    return model


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    """Two heads that share a key and value head; called with keywords alone."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def seeded(build: Callable[[], Model], seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return build().double()


@dataclass(frozen=True)
class Case:
    """build() a model; x(rows), y(rows) its data; losses(model, x, y) -> (rows,); logits(model, x) for the
    oracle; rules: the layer types that the case covers."""

    name: str
    build: Callable[[], nn.Module]
    rules: tuple[type[nn.Module], ...]
    tokens: bool = True
    shape: tuple[int, ...] = (T,)
    padded: bool = False
    losses: Losses = per_sample_losses
    logits: Callable[[Any, Tensor], Tensor] = lambda model, x: model(x)

    def model(self) -> Any:
        """A module; what it has besides depends on the case."""
        return seeded(self.build)

    def truth(self, n: int, m: int, seed: int = 1, model: nn.Module | None = None) -> Truth:
        """The oracle's numbers for n train and m validation rows of the data of this seed. model: another one
        than that of the case."""
        twin = self.model() if model is None else model
        return per_sample(twin, self.logits, *self.data(n + m, seed), n)

    def data(self, rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        """x (rows, *shape), in float64 or token ids from few tokens, so that they repeat; y without the
        feature dimension."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            x = torch.randint(V, (rows, *self.shape), generator=generator)
            x[..., : T // 2] %= 3
            y = torch.randint(V, (rows, *self.shape), generator=generator)
        else:
            x = torch.randn(rows, *self.shape, D, generator=generator, dtype=torch.float64)
            y = torch.randint(V, (rows, *self.shape), generator=generator)
        if self.padded:
            for i in range(rows):
                y[i, : i % (T - 1)] = -100
        return x, y


def hf_logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logits


def fused_logits(model: CausalLM, x: Tensor) -> Tensor:
    return model.hf.transformer(x).last_hidden_state @ model.hf.lm_head.weight.T


class Positions(nn.Module):
    """Token and position embeddings, with position ids that are expanded to all rows or not."""

    def __init__(self, expanded: bool) -> None:
        super().__init__()
        self.wte, self.wpe, self.out = nn.Embedding(V, D), nn.Embedding(T, D), nn.Linear(D, V)
        self.expanded = expanded

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(T)[None]
        return self.out(self.wte(x) + self.wpe(ids.expand_as(x) if self.expanded else ids))


class Transposed(nn.Module):
    """A layer that takes channels before positions, on positions before channels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(-1, 1)).movedim(1, -1)


class Cut(nn.Module):
    """The first positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.positions]


class FusedOnly(nn.Module):
    """The fused head on given hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(D, D), CrossEntropyHead(D, V)
        nn.init.normal_(self.head.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh(), y)


class TiedLinear(nn.Module):
    """An embedding tied to a plain nn.Linear with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.mid, self.out = nn.Embedding(V, D), Conv1D(D, D), nn.Linear(D, V)
        self.out.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mid(self.wte(x)).tanh())


class Wired(nn.Module):
    """Token embedding, a layer between and an output layer, wired as a test wants them; run(model, hidden)
    -> logits."""

    lin: Any  # the layer between
    run: Callable

    def __init__(self, run: Callable, between: Callable[[], nn.Module] = lambda: nn.Linear(D, D)) -> None:
        super().__init__()
        self.wte, self.lin, self.out, self.run = nn.Embedding(V, D), between(), nn.Linear(D, V), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.wte(x))


def call_with_targets(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x, y)


def mlp(bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5, bias=bias), nn.Tanh(), nn.Linear(5, V, bias=bias))


def fused_gpt2(tied: bool) -> CausalLM:
    return CausalLM(tiny_gpt2(tied))


CASES = [
    Case("linear-2d", lambda: mlp(True), (nn.Linear,), tokens=False, shape=()),
    Case("linear-3d", lambda: mlp(True), (nn.Linear,), tokens=False),
    Case("linear-4d", lambda: mlp(True), (nn.Linear,), tokens=False, shape=(2, T)),
    Case("linear-no-bias", lambda: mlp(False), (nn.Linear,), tokens=False),
    Case("conv1d", lambda: nn.Sequential(Conv1D(5, D), nn.Tanh(), Conv1D(V, 5)), (Conv1D,), tokens=False),
    Case(
        "conv1d-2d",
        lambda: nn.Sequential(Conv1D(5, D), nn.Tanh(), Conv1D(V, 5)),
        (Conv1D,),
        tokens=False,
        shape=(),
    ),
    Case(
        "layer-norm", lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, V)), (nn.LayerNorm,), tokens=False
    ),
    Case(
        "layer-norm-2d",
        lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, V)),
        (nn.LayerNorm,),
        tokens=False,
        shape=(),
    ),
    Case(
        "layer-norm-no-bias",
        lambda: nn.Sequential(nn.LayerNorm(D, bias=False), nn.Linear(D, V)),
        (nn.LayerNorm,),
        tokens=False,
    ),
    Case(
        "layer-norm-two-dimensions",
        lambda: nn.Sequential(nn.LayerNorm((T, D)), nn.Linear(D, V)),
        (nn.LayerNorm,),
        tokens=False,
    ),
    Case("rms-norm", lambda: nn.Sequential(nn.RMSNorm(D), nn.Linear(D, V)), (), tokens=False),
    Case(
        "convolution",
        lambda: nn.Sequential(
            Transposed(nn.Conv1d(D, D, 3, padding=1)),
            nn.Tanh(),
            Transposed(nn.Conv1d(D, D, 2, padding="same", groups=4)),
            Transposed(nn.GroupNorm(2, D)),
            nn.Linear(D, V),
        ),
        (nn.Conv1d, nn.GroupNorm),
        tokens=False,
    ),
    Case(
        "convolution-2d",
        lambda: nn.Sequential(Transposed(nn.Conv2d(D, D, (2, 3), padding=(1, 1))), Cut(2), nn.Linear(D, V)),
        (nn.Conv2d,),
        tokens=False,
        shape=(2, T),
    ),
    Case("embedding", lambda: nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V)), (nn.Embedding,)),
    Case(
        "embedding-1d", lambda: nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V)), (nn.Embedding,), shape=()
    ),
    Case(
        "embedding-padding",
        lambda: nn.Sequential(nn.Embedding(V, D, padding_idx=1), nn.Linear(D, V)),
        (nn.Embedding,),
    ),
    Case("positions-broadcast", lambda: Positions(False), (nn.Embedding,)),
    Case("positions-expanded", lambda: Positions(True), (nn.Embedding,)),
    Case(
        "fused-head",
        FusedOnly,
        (CrossEntropyHead,),
        tokens=False,
        padded=True,
        losses=call_with_targets,
        logits=lambda model, x: model.inner(x).tanh() @ model.head.weight.T,
    ),
    Case("tied-linear", TiedLinear, (nn.Linear, nn.Embedding)),
    Case("gpt2-tied", lambda: tiny_gpt2(True), (), logits=hf_logits),
    Case("gpt2-untied", lambda: tiny_gpt2(False), (), logits=hf_logits),
    Case("gpt2-tied-padded", lambda: tiny_gpt2(True), (), logits=hf_logits, padded=True),
    Case("fused-gpt2-tied", lambda: fused_gpt2(True), (), losses=call_with_targets, logits=fused_logits),
    Case(
        "fused-gpt2-tied-padded",
        lambda: fused_gpt2(True),
        (),
        losses=call_with_targets,
        logits=fused_logits,
        padded=True,
    ),
    Case(
        "fused-gpt2-untied",
        lambda: fused_gpt2(False),
        (),
        losses=call_with_targets,
        logits=fused_logits,
        padded=True,
    ),
]

BY_NAME = {case.name: case for case in CASES}


def token_rows(rows: int = 5, positions: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randint(V, (2, rows, positions), generator=generator)
    return x, y


def copy_in(model: Model, dtype: torch.dtype) -> Model:
    """The same weights in another precision."""
    return deepcopy(model).to(dtype)


def token_truth(model: nn.Module, rows: int = 5, positions: int = T, m: int = 2) -> Truth:
    """The oracle's numbers for a model on token rows, of which the last m are validation rows."""
    return per_sample(deepcopy(model), lambda m, x: m(x), *token_rows(rows, positions), rows - m)


def exact(
    model: nn.Module, rows: int = 5, positions: int = T, losses: Losses = per_sample_losses, **options: Any
) -> bool:
    """One step of the model on token rows agrees with the oracle, dots and gradients."""
    truth = token_truth(model, rows, positions)
    dots, _ = joint_step(model, *token_rows(rows, positions), 2, losses, **options)
    granularity = options.get("granularity")
    if granularity == "pairwise":
        error = truth.pairwise_error(dots)
    else:
        error = truth.dot_error(dots.sum(1) if granularity == "per_layer" else dots)
    return error < 1e-10 and truth.gradient_error(model) < 1e-10


def gradient_of(tensor: Tensor) -> Tensor:
    """Its `.grad`, which is there."""
    assert tensor.grad is not None
    return tensor.grad


def joint_step(
    model: nn.Module, x: Tensor, y: Tensor, m: int, losses: Losses = per_sample_losses, **options: Any
) -> tuple[Tensor, Tensor]:
    """(dots, losses) of one step with the engine; the gradients are the model's."""
    with GradDotProdEngine(model, val_batch_size=m, **options) as engine:
        row_losses = losses(model, x, y)
        engine.joint_loss(row_losses).backward()
        engine.prepare_gradients()
        return engine.dot_products(), row_losses.detach()
