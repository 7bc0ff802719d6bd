"""Small networks that can be drawn at random: each is described by a `Network`, and built from that description.

All layers map hidden states (N, T, D) to (N, T, D), so that any of them may follow any other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from cases import D, Transposed, V, seeded
from test_coverage import Experts, ScaledEmbedding, Shift, SubclassedLinear, TokenAndScale, TwiceLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ghostEngines import CrossEntropyHead

PLACES = 11  # of position embeddings


class RootMeanSquare(nn.Module):
    """Llama's norm (offset 0) or Gemma's (offset 1), a class that the engine does not know."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(D)), offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)


class Scale(nn.Module):
    """A scale of each channel, or of all of them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class MatrixProduct(nn.Module):
    """A bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class RoutedExperts(nn.Module):
    """A router, and experts that get the flattened tokens, their expert and its weight."""

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.ones(3, D, 2)), nn.Parameter(torch.ones(3, 2, D))

        def forward(self, tokens: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
            output = torch.zeros_like(tokens)
            for number in range(3):
                some = torch.where(expert == number)[0]
                result = (tokens[some] @ self.up[number]).tanh() @ self.down[number]
                output = output.index_add(0, some, result * weight[some, None])
            return output

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 3, bias=False), self.Stacked()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weight, expert = self.router(tokens).softmax(-1).max(-1)
        return self.experts(tokens, expert, weight).view(x.shape)


class Attention(nn.Module):
    """Two causal heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.RMSNorm(D // 2, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class OneColumn(nn.Module):
    """A layer of images, on a sequence as an image of one column."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mT[..., None])[..., 0].mT


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3), nn.GELU(), nn.Linear(3, D))


ANY_SHAPE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "linear without bias": lambda: nn.Linear(D, D, bias=False),
    "Conv1D": lambda: Conv1D(D, D),
    "layer norm": lambda: nn.LayerNorm(D),
    "layer norm without bias": lambda: nn.LayerNorm(D, bias=False),
    "RMS norm": lambda: nn.RMSNorm(D, eps=1e-5),
    "Llama's norm": lambda: RootMeanSquare(0.0),
    "Gemma's norm": lambda: RootMeanSquare(1.0),
    "subclass of linear": lambda: SubclassedLinear(D, D),
    "another subclass of linear": lambda: TwiceLinear(D, D),
    "scale": lambda: Scale(D),
    "scalar": Scale,
    "one number": lambda: Scale(1),
    "shift": Shift,
    "bare matrix": MatrixProduct,
    "MLP": mlp,
}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: Transposed(nn.Conv1d(D, D, 3, padding=1)),
    "grouped convolution": lambda: Transposed(nn.Conv1d(D, D, 2, padding="same", groups=4)),
    "depthwise convolution": lambda: Transposed(nn.Conv1d(D, D, 3, padding=1, groups=D, bias=False)),
    "convolution 2d": lambda: OneColumn(nn.Conv2d(D, D, (3, 1), padding=(1, 0))),
    "group norm": lambda: Transposed(nn.GroupNorm(2, D)),
    "tokens and scales": TokenAndScale,
    "scale of three dimensions": lambda: Scale(1, 1, D),
    "attention": Attention,
    "routed experts": RoutedExperts,
}
FLAT: dict[str, Callable[[], nn.Module]] = {"experts": Experts}  # (N·T, D)
LAYERS = ANY_SHAPE | SEQUENCES | FLAT

Layer = Callable[[Tensor], Tensor]


def without_gradients(f: Layer, h: Tensor, _: Tensor) -> Tensor:
    """A look at the result before the result."""
    with torch.no_grad():
        seen = f(h)
    return f(h + seen)


def changed_afterwards(f: Layer, h: Tensor, _: Tensor) -> Tensor:
    """The input of a layer that need not keep it is changed in place."""
    y = f(h)
    return y + h.mul_(0.5)


def constant(h: Tensor, *shape: int) -> Tensor:
    """Numbers that belong to no row."""
    return torch.linspace(-1, 1, D, dtype=h.dtype).sin().expand(*shape, D).clone()


def flat(f: Layer, h: Tensor, _: Tensor) -> Tensor:
    return f(h.flatten(0, 1)).view(h.shape)


# How a layer is used: (layer, hidden states, hidden states of the network's start) -> hidden states
OF_SEQUENCES: dict[str, Callable[[Layer, Tensor, Tensor], Tensor]] = {
    "in a row": lambda f, h, start: f(h),
    "residual": lambda f, h, start: h + f(h),
    "gate": lambda f, h, start: h * f(h).sigmoid(),
    "added in place": lambda f, h, start: f(h).add_(h),
    "twice in a row": lambda f, h, start: f(f(h)),
    "twice side by side": lambda f, h, start: f(h) * f(h.flip(1)).tanh(),
    "first position, then all": lambda f, h, start: f(h[:, :1]) + f(h),
    "from the start": lambda f, h, start: h + f(start),
    "once not differentiated": lambda f, h, start: h + f(h) + 0 * f(h).detach(),
    "first not differentiated": lambda f, h, start: h + 0 * f(h).detach() + f(h),
    "not used": lambda f, h, start: h,
    "result not used": lambda f, h, start: (f(h), h)[1],
    "two entries for a row": lambda f, h, start: (
        f(h.repeat_interleave(2, 0)).view(len(h), 2, *h.shape[1:]).sum(1)
    ),
    "without gradients before": without_gradients,
    "input changed in place": lambda f, h, start: f(h.mul_(0.5)),
    "input changed in place afterwards": changed_afterwards,
}
OF_ANY_SHAPE = OF_SEQUENCES | {
    "flat": flat,
    "flat, then not": lambda f, h, start: f(flat(f, h, start)),
    "four dimensions": lambda f, h, start: f(torch.stack([h, h.tanh()], 1)).sum(1),
    "pooled": lambda f, h, start: h + f(h.mean(1))[:, None],
    "of a vector for all": lambda f, h, start: h + f(constant(h)),
    "of a factor for all": lambda f, h, start: h * f(constant(h, 1)).tanh(),
    "of a sequence for all": lambda f, h, start: h + f(constant(h, h.shape[1])),
    "sequence first": lambda f, h, start: f(h.transpose(0, 1)).transpose(0, 1).contiguous(),
}
OF_FLAT = {"flat": flat, "flat residual": lambda f, h, start: h + flat(f, h, start)}
WIRINGS = OF_ANY_SHAPE | OF_FLAT


def wirings_of(kind: str) -> list[str]:
    return list(OF_ANY_SHAPE if kind in ANY_SHAPE else OF_SEQUENCES if kind in SEQUENCES else OF_FLAT)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda h: h,
    "tanh": torch.tanh,
    "leaky in place": lambda h: F.leaky_relu(h, 0.1, inplace=True),
    "tanh in place": lambda h: h.tanh_(),
    "doubled in place": lambda h: h.mul_(2),
}

# What positions add: (network, tokens or numbers (N, T, ...)) -> something that broadcasts to (N, T, D)
POSITIONS: dict[str, Callable[["DrawnNetwork", Tensor], Tensor | float]] = {
    "none": lambda m, x: 0.0,
    "(T,)": lambda m, x: m.wpe(torch.arange(x.shape[1])),
    "(1, T)": lambda m, x: m.wpe(torch.arange(x.shape[1])[None]),
    "(N, T)": lambda m, x: m.wpe(torch.arange(x.shape[1])[None].expand(len(x), -1)),
    "(T,), then tanh": lambda m, x: m.wpe(torch.arange(x.shape[1])).tanh(),
    "(1,)": lambda m, x: m.wpe(torch.tensor([0])),
    "()": lambda m, x: m.wpe(torch.tensor(0)),
    "two lookups": lambda m, x: m.wpe(torch.arange(x.shape[1])[None]) + m.wpe(torch.tensor([1])),
    "a table": lambda m, x: m.table[: x.shape[1]],
    "a table of three dimensions": lambda m, x: m.table[None, : x.shape[1]],
}

SOURCES = ("tokens", "scaled tokens", "tokens with padding", "numbers")
HEADS = (
    "linear", "linear without bias", "Conv1D", "twice", "first and last", "two that are tied", "pooled", "scaled",
    "tied", "tied with bias", "tied twice", "tied two", "fused", "tied fused", "padded", "padded tied fused",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One layer and its use. tied: whether it shares what it can with an earlier block's layer."""

    kind: str = "linear"
    wiring: str = "in a row"
    activation: str = "none"
    tied: bool = False
    frozen: Literal["nothing", "everything", "first", "last"] = "nothing"
    checkpointed: bool = False


@dataclass(frozen=True)
class Network:
    """A network, and the size of its batches: n train rows, m validation rows, T positions."""

    blocks: tuple[Block, ...] = ()
    source: str = "tokens"
    positions: str = "none"
    head: str = "linear"
    source_frozen: bool = False
    head_frozen: bool = False
    checkpointed: bool = False  # all blocks together
    n: int = 1
    m: int = 1
    T: int = 2
    seed: int = 0

    @property
    def tied(self) -> bool:
        """Whether there may be tied weights."""
        return "tied" in self.head or any(block.tied for block in self.blocks)

    @property
    def source_trains(self) -> bool:
        shared = self.head.startswith("tied") or "tied fused" in self.head
        return self.source != "numbers" and not self.source_frozen and not (shared and self.head_frozen)

    @property
    def fused(self) -> bool:
        return "fused" in self.head

    def build(self) -> "DrawnNetwork":
        model = seeded(lambda: DrawnNetwork(self), self.seed)
        assert isinstance(model, DrawnNetwork)
        return model

    def data(self, rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        """x (rows, T) or (rows, T, D), y (rows, T) or (rows,)."""
        generator = torch.Generator().manual_seed(seed + 2 * self.seed)
        if self.source == "numbers":
            x = torch.randn(rows, self.T, D, generator=generator, dtype=torch.float64)
        else:
            x = torch.randint(V, (rows, self.T), generator=generator)
            x[:, : self.T // 2] %= 3  # tokens that repeat
        y = torch.randint(V, (rows, self.T), generator=generator)
        if "padded" in self.head:
            for i in range(rows):
                y[i, : i % self.T] = -100
        return x, (y[:, 0] if self.head == "pooled" else y)


class DrawnNetwork(nn.Module):
    """Tokens or numbers, positions, blocks, output layer; (x) -> logits, or with a fused head (x, y) -> losses."""

    wpe: nn.Embedding  # of positions, where the network has them
    table: nn.Parameter
    out: Any  # the output layer, of any kind

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, source, head = network, network.source, network.head
        if source != "numbers":
            kind = ScaledEmbedding if source == "scaled tokens" else nn.Embedding
            self.wte = kind(V, D, padding_idx=1 if source == "tokens with padding" else None)
        if "table" in network.positions:
            self.table = nn.Parameter(torch.ones(PLACES, D))
        elif network.positions != "none":
            self.wpe = nn.Embedding(PLACES, D)
        self.layers = nn.ModuleList(LAYERS[block.kind]() for block in network.blocks)
        if network.fused:
            self.out = CrossEntropyHead(D, V)
        else:
            self.out = Conv1D(V, D) if head == "Conv1D" else nn.Linear(D, V, bias=head in BIASED)
        if head in ("two that are tied", "tied two"):
            self.out2 = nn.Linear(D, V)
        if head == "scaled":
            self.temperature = nn.Parameter(torch.ones(()))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self._tie()
        self._freeze()

    def _tie(self) -> None:
        head = self.network.head
        if head == "two that are tied":
            self.out2.weight = self.out.weight
        elif head.startswith("tied") or "tied fused" in head:
            self.out.weight = self.wte.weight
            if head == "tied two":
                self.out2.weight = self.wte.weight
        for number, block in enumerate(self.network.blocks):
            for earlier in reversed(self.layers[:number]) if block.tied else ():
                if shared := list(_alike(self.layers[number], earlier)):
                    for module, key, parameter in shared:
                        setattr(module, key, parameter)
                    break

    def _freeze(self) -> None:
        for layer, block in zip(self.layers, self.network.blocks, strict=True):
            parameters = list(layer.parameters())
            chosen = {
                "nothing": slice(0),
                "everything": slice(None),
                "first": slice(1),
                "last": slice(-1, None),
            }
            for parameter in parameters[chosen[block.frozen]]:
                parameter.requires_grad_(False)
        if self.network.head_frozen:
            self.out.requires_grad_(False)
        if self.network.source_frozen and self.network.source != "numbers":
            self.wte.requires_grad_(False)

    def _block(self, number: int, h: Tensor, start: Tensor) -> Tensor:
        block, layer = self.network.blocks[number], self.layers[number]
        h = h * 1.0 if block.checkpointed else h

        def f(x: Tensor) -> Tensor:
            return ACTIVATIONS[block.activation](layer(x.contiguous() if isinstance(layer, Conv1D) else x))

        return WIRINGS[block.wiring](f, h, start)

    def _hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states at the start and at the end."""
        h = x * 1.0 if self.network.source == "numbers" else self.wte(x)
        h = h + POSITIONS[self.network.positions](self, x)
        start = h.clone()  # blocks may change h in place

        def run(h: Tensor) -> Tensor:
            h = (
                h * 1.0 if self.network.checkpointed else h
            )  # what is recomputed from may not be changed in place
            for number, block in enumerate(self.network.blocks):
                if block.checkpointed:
                    h = checkpoint(self._block, number, h, start, use_reentrant=False)
                else:
                    h = self._block(number, h, start)
            return h

        return start, checkpoint(run, h, use_reentrant=False) if self.network.checkpointed else run(h)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        start, h = self._hidden(x)
        h = h.contiguous()
        head = self.network.head
        if self.network.fused:
            return self.out(h, y)
        if head in ("twice", "tied twice"):
            return self.out(h) + self.out(h.tanh())
        if head == "first and last":
            return self.out(h) + self.out(start)
        if head in ("two that are tied", "tied two"):
            return self.out(h) + self.out2(h.tanh())
        if head == "scaled":
            return self.out(h) * self.temperature
        return self.out(h.mean(1) if head == "pooled" else h)

    def logits(self, x: Tensor) -> Tensor:
        return self._hidden(x)[1] @ self.out.weight.T if self.network.fused else self(x)


BIASED = ("linear", "twice", "two that are tied", "pooled", "scaled", "tied with bias", "padded")


def _alike(layer: nn.Module, earlier: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Module and key of each parameter of the layer for which the earlier one has one of this name and shape."""
    others = dict(earlier.named_parameters())
    for name, parameter in list(layer.named_parameters()):
        other = others.get(name)
        if other is not None and other.shape == parameter.shape:
            path, _, key = name.rpartition(".")
            yield layer.get_submodule(path), key, other
