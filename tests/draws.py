"""What is drawn: networks, options of the engine, and what is left out because it is known not to be exact."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cases import D
from drawn_networks import ACTIVATIONS, HEADS, LAYERS, POSITIONS, SOURCES, Block, Network, wirings_of
from hypothesis import strategies as st

from foundation.granularity import Granularity
from ghostEngines.strategies import STRATEGIES

Direction = Literal["gradient", "auto"]
FACTORS = (1.0, 0.25, 1024.0)


@dataclass(frozen=True)
class Options:
    """How the engine is used. steps: the last one is looked at; it has `fewer` train rows less than the others."""

    granularity: Granularity = "total"
    strategy: str | None = None
    direction: Direction = "gradient"
    micro_batches: int = 1
    factor: float = 1.0
    steps: int = 1
    fewer: int = 0


def numbers_of_rows(network: Network, options: Options) -> list[int]:
    """Of the passes, the first pass's first."""
    numbers = []
    for n in (network.n, network.n - options.fewer):
        numbers += [n + network.m, *([n] if options.micro_batches > 1 else [])]
    return numbers


def ambiguous(network: Network, options: Options) -> bool:
    """Whether a first dimension that is not the rows' may be taken for them."""
    return any(
        size % rows == 0 for size in (network.T, D) for rows in numbers_of_rows(network, options) if rows > 1
    )


def _any(test: Callable[[Network, Block], bool]) -> Callable[[Network, Options], bool]:
    return lambda network, options: any(test(network, block) for block in network.blocks)


def _recomputed(network: Network, block: Block) -> bool:
    return network.checkpointed or block.checkpointed


BARE = {
    "scale", "scalar", "one number", "shift", "bare matrix", "another subclass of linear", "tokens and scales",
    "scale of three dimensions"
}  # fmt: skip
WITHOUT_ROWS = {"of a vector for all", "of a factor for all", "of a sequence for all", "sequence first"}

# Networks that are not drawn, each kind under a name: F, faults of the engine that are open; L, limits that it states
# (or PyTorch has): what cannot be taken apart.
KNOWN: dict[str, Callable[[Network, Options], bool]] = {
    "F12 a matrix before which nothing trains": _any(
        lambda network, block: (
            block.kind in ("bare matrix", "another subclass of linear") and not network.source_trains
        )
    ),
    "L1 a layer on the output without rows of another one": _any(
        lambda network, block: block.kind == "MLP" and block.wiring in WITHOUT_ROWS
    ),
    "L2 an operation on a sequence before its rows": _any(
        lambda network, block: (
            block.wiring == "sequence first" and (block.kind in BARE or block.activation != "none")
        )
    ),
    "L3 AdamW's moments of what is not used": lambda network, options: (
        options.direction == "auto" and any(block.wiring == "result not used" for block in network.blocks)
    ),
    "L4 a join in a checkpoint": _any(
        lambda network, block: (
            _recomputed(network, block) and (block.kind in BARE or block.wiring in WITHOUT_ROWS)
        )
    ),
    "L5 a layer's input is changed in place afterwards": _any(
        lambda network, block: (
            "afterwards" in block.wiring
            and (_recomputed(network, block) or (block.kind != "shift" and block.frozen != "everything"))
        )
    ),
}
# PROPERTY_KNOWN="F12 L1" draws those all the same, to see whether they are repaired; "all" draws all.
DRAWN = os.environ.get("PROPERTY_KNOWN", "").split()


def known(network: Network, options: Options) -> bool:
    """Whether a network is one of those that are not drawn."""
    return any(
        name.split()[0] not in DRAWN and "all" not in DRAWN and test(network, options)
        for name, test in KNOWN.items()
    )


def blocks() -> st.SearchStrategy[Block]:
    def of(kind: str) -> st.SearchStrategy[Block]:
        return st.builds(
            Block,
            kind=st.just(kind),
            wiring=st.sampled_from(wirings_of(kind)),
            activation=st.sampled_from(list(ACTIVATIONS)),
            tied=rarely,
            frozen=st.sampled_from(("nothing", "nothing", "nothing", "everything", "first", "last")),
            checkpointed=rarely,
        )

    return st.sampled_from(list(LAYERS)).flatmap(of)


rarely = st.sampled_from((False, False, False, True))


@st.composite
def networks(draw: st.DrawFn) -> Network:
    n, m = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    source = draw(st.sampled_from(SOURCES))
    heads = [head for head in HEADS if source != "numbers" or not _of_tokens(head)]
    return Network(
        blocks=tuple(draw(st.lists(blocks(), min_size=0, max_size=4))),
        source=source,
        positions=draw(st.sampled_from(["none", *POSITIONS])),
        head=draw(st.sampled_from(heads)),
        source_frozen=draw(rarely),
        head_frozen=draw(rarely),
        checkpointed=draw(rarely),
        n=n,
        m=m,
        T=draw(st.sampled_from((1, 2, 3, 4, 5, n + m))),
        seed=draw(st.integers(0, 3)),
    )


def _of_tokens(head: str) -> bool:
    return "tied" in head and head != "two that are tied"


@st.composite
def cases(draw: st.DrawFn) -> tuple[Network, Options]:
    """A network, and options that the engine's documentation allows for it."""
    network = draw(networks())
    directions: tuple[Direction, ...] = ("gradient", "gradient", "auto")
    direction = draw(st.sampled_from(directions))
    micro_batches = draw(st.sampled_from((1, 1, 2, 3)))
    granularities: list[Granularity] = ["total", "pairwise", "per_layer"]
    strategies = [None, *STRATEGIES]
    if micro_batches > 1:
        granularities.remove("pairwise")
    if micro_batches > 1 and network.tied:
        granularities.remove("per_layer")
    if micro_batches > 1 or direction == "auto":
        strategies = [each for each in strategies if each is None or STRATEGIES[each].by_direction]
    steps = 2 if direction == "auto" else draw(st.sampled_from((1, 1, 2)))
    return network, Options(
        granularity=draw(st.sampled_from(granularities)),
        strategy=draw(st.sampled_from(strategies)),
        direction=direction,
        micro_batches=micro_batches,
        factor=draw(st.sampled_from(FACTORS)),
        steps=steps,
        fewer=draw(st.integers(0, min(1, network.n - 1))) if steps > 1 else 0,
    )
