"""Networks drawn at random: the engine's numbers are those of one backward pass per sample, or it says clearly why not.

200 networks, the same ones each time. `PROPERTY_EXAMPLES=5000 PROPERTY_SEED=1` draws more, and others.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from cases import D, call_with_targets
from drawn_networks import (
    ACTIVATIONS,
    HEADS,
    LAYERS,
    POSITIONS,
    SOURCES,
    Block,
    DrawnNetwork,
    Network,
    wirings_of,
)
from hypothesis import HealthCheck, Phase, assume, event, given, reject, seed, settings
from hypothesis import strategies as st
from test_adamw_direction import BETAS, Oracle
from torch import Tensor, nn

from benchmarks.oracle import Truth, per_sample
from ghostEngines import GradDotProdEngine, per_sample_losses
from ghostEngines.strategies import STRATEGIES

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "200"))
SEED = os.environ.get("PROPERTY_SEED")
FACTORS = (1.0, 0.25, 1024.0)
EPS = 1e-3
REFUSALS = (ValueError, RuntimeError)  # AttachError and RowsError among them
# What the engine says where a first dimension may be the rows' by chance.
AMBIGUITIES = (
    "which may be one entry for each of",
    "the loss of a row has a gradient at other rows",
    "cannot tell what each sample adds",
)


@dataclass(frozen=True)
class Options:
    """How the engine is used. steps: the last one is looked at; it has `fewer` train rows less than the others."""

    granularity: str = "total"
    strategy: str | None = None
    direction: str = "gradient"
    micro_batches: int = 1
    factor: float = 1.0
    steps: int = 1
    fewer: int = 0


def _any(test: Callable[[Network, Block], bool]) -> Callable[[Network, Options], bool]:
    return lambda network, options: any(test(network, block) for block in network.blocks)


def _recomputed(network: Network, block: Block) -> bool:
    return network.checkpointed or block.checkpointed


BARE = {
    "scale", "scalar", "one number", "shift", "bare matrix", "tokens and scales", "scale of three dimensions",
    "another subclass of linear",
}  # fmt: skip
WITHOUT_ROWS = {"of a vector for all", "of a factor for all", "of a sequence for all", "sequence first"}

# Networks that are not drawn, each kind under a name: F, faults of the engine that are open; L, limits that it states
# (or PyTorch has): what cannot be taken apart.
KNOWN: dict[str, Callable[[Network, Options], bool]] = {
    "F5 rows that the guard has not seen": lambda network, options: (
        network.T % numbers_of_rows(network, options)[0] != 0
        and any(rows > 1 and network.T % rows == 0 for rows in numbers_of_rows(network, options)[1:])
        and ("table" in network.positions or any(block.wiring in WITHOUT_ROWS for block in network.blocks))
    ),
    "F6 nothing trains but a fused head": lambda network, options: (
        network.fused and not any(p.requires_grad for p in network.build().before_head())
    ),
    "F8 a use without rows that is not differentiated": _any(
        lambda network, block: (
            block.kind in BARE and block.wiring in ("first not differentiated", "result not used")
        )
    ),
    "F9 one row, and nothing before the positions trains": lambda network, options: (
        1 in numbers_of_rows(network, options)
        and network.positions != "none"
        and (network.source_frozen or network.source == "numbers")
    ),
    "F10 a gradient of nothing but rounding": _any(
        lambda network, block: (
            network.fused
            and block.kind == "attention"  # over one position
            and (network.T == 1 or block.wiring == "first position, then all")
        )
    ),
    "F11 the model's own parameter is not named": lambda network, options: (
        "table" in network.positions and ambiguous(network, options)
    ),
    "F12 a matrix before which nothing trains": _any(
        lambda network, block: (
            block.kind in ("bare matrix", "another subclass of linear")
            and (network.source_frozen or network.source == "numbers")
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
        options.direction == "adamw" and any(block.wiring == "result not used" for block in network.blocks)
    ),
    "L4 a join in a checkpoint": _any(
        lambda network, block: (
            _recomputed(network, block) and (block.kind in BARE or block.wiring in WITHOUT_ROWS)
        )
    ),
    "L5 a layer's input is changed in place afterwards": _any(
        lambda network, block: (
            "afterwards" in block.wiring
            and (_recomputed(network, block) or (block.kind not in BARE and block.frozen != "everything"))
        )
    ),
}
# PROPERTY_KNOWN="F5 F6" draws those all the same, to see whether they are repaired; "all" draws all.
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
    direction = draw(st.sampled_from(("gradient", "gradient", "adamw")))
    micro_batches = draw(st.sampled_from((1, 1, 2, 3)))
    granularities = ["total", "pairwise", "per_layer"]
    strategies = [None, *STRATEGIES]
    if micro_batches > 1:
        granularities.remove("pairwise")
    if micro_batches > 1 and network.tied:
        granularities.remove("per_layer")
    if micro_batches > 1 or direction == "adamw":
        strategies = [each for each in strategies if each is None or STRATEGIES[each].by_direction]
    steps = 2 if direction == "adamw" else draw(st.sampled_from((1, 1, 2)))
    return network, Options(
        granularity=draw(st.sampled_from(granularities)),
        strategy=draw(st.sampled_from(strategies)),
        direction=direction,
        micro_batches=micro_batches,
        factor=draw(st.sampled_from(FACTORS)),
        steps=steps,
        fewer=draw(st.integers(0, min(1, network.n - 1))) if steps > 1 else 0,
    )


def truth_of(network: Network, model: DrawnNetwork, options: Options, step: int) -> Truth:
    """That of the model's present weights. Rejects networks that plain PyTorch cannot differentiate."""
    twin = network.build()
    twin.load_state_dict(model.state_dict())
    rows = network.n * options.micro_batches
    try:
        return per_sample(twin, DrawnNetwork.logits, *network.data(rows + network.m, step), rows)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error) or "does not require grad" in str(error):
            reject()
        raise


def engine_step(
    engine: GradDotProdEngine, network: Network, model: nn.Module, options: Options, step: int
) -> Tensor:
    """The dot products of a step's micro-batches; its gradients are the model's."""
    n, rows = network.n, network.n * options.micro_batches
    x, y = network.data(rows + network.m, step)
    dots = []
    for start in range(0, rows, n):
        some = [*range(start, start + n), *(range(rows, rows + network.m) if start == 0 else ())]
        losses = (call_with_targets if network.fused else per_sample_losses)(model, x[some], y[some])
        (options.factor * engine.joint_loss(losses)).backward()
        engine.prepare_gradients()
        dots.append(engine.dot_products())
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= options.factor
    return torch.cat(dots)


def check_exact(network: Network, options: Options) -> None:
    """Assert that dots and gradients of the last step are right; raises what the engine raises."""
    model = network.build()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        reject()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=BETAS, eps=EPS)
    moments = Oracle(EPS)
    engine = GradDotProdEngine(
        model,
        network.m,
        granularity=options.granularity,
        strategy=options.strategy,
        direction=options.direction,
        micro_batches=options.micro_batches,
    )
    truth = truth_of(network, model, options, 1)
    if not truth.vectors().any():  # what trains is not used
        reject()
    engine.attach(optimizer, loss_scale=options.factor)
    dots = engine_step(engine, network, model, options, 1)
    for step in range(2, options.steps + 1):
        moments.update(truth)
        optimizer.step()
        optimizer.zero_grad()
        network = replace(network, n=network.n - options.fewer)
        truth = truth_of(network, model, options, step)
        dots = engine_step(engine, network, model, options, step)
    names = engine.layer_names
    engine.detach()
    weighed = truth.times(moments.preconditioner().sqrt()) if options.direction == "adamw" else truth
    assert_dots(weighed, dots, options.granularity, groups(model, names))
    assert_gradients(truth, model)


def assert_dots(
    truth: Truth, dots: Tensor, granularity: str, layers: list[tuple[list[int], list[str]]]
) -> None:
    """To 1e-9 of the gradients' norms."""
    norms = truth.vectors().norm(dim=1)
    scale = norms[: truth.n] * norms[truth.n :].max()
    if granularity == "per_layer":
        assert sum(len(columns) for columns, _ in layers) == dots.shape[1]
        for columns, names in layers:
            part = truth.part(names)
            want = part.dots() if part.gradients[0] else torch.zeros_like(scale)  # a frozen fused head
            near(dots[:, columns].sum(1), want, scale)
    elif granularity == "pairwise":
        near(dots, truth.pairwise(), scale[:, None])
    else:
        near(dots, truth.dots(), scale)


def near(got: Tensor, want: Tensor, scale: Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float64
    assert ((got - want).abs() <= 1e-9 * scale + 1e-14).all(), f"dots {got}, want {want}"


def assert_gradients(truth: Truth, model: nn.Module) -> None:
    """To 1e-9 of the norm of all of them: those of some parameters cancel to next to nothing."""
    wanted = truth.training_gradient()
    norm = torch.cat([want.flatten() for want in wanted.values()]).norm()
    for name, parameter in model.named_parameters():
        if name not in wanted:
            assert parameter.grad is None, name
            continue
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (got - wanted[name]).norm() <= 1e-9 * norm + 1e-14, f"gradient of {name}"


def groups(model: nn.Module, names: list[str]) -> list[tuple[list[int], list[str]]]:
    """The columns of layers that share parameters, and the modules in them, of which one is named as the owner."""
    found: list[tuple[set[int], list[int], list[str]]] = []
    for column, name in enumerate(names):
        inside = (inner for inner, _ in model.get_submodule(name).named_modules(prefix=name))
        modules = [each for each in inside if each == name or each not in names]
        ids = {id(p) for each in modules for p in model.get_submodule(each).parameters(recurse=False)}
        sharing = [each for each in found if each[0] & ids]
        found = [each for each in found if not each[0] & ids]
        found.append(
            (
                ids.union(*(each[0] for each in sharing)),
                [column, *(c for each in sharing for c in each[1])],
                [*modules, *(n for each in sharing for n in each[2])],
            )
        )
    return [(columns, modules) for _, columns, modules in found]


def numbers_of_rows(network: Network, options: Options) -> list[int]:
    """Of the passes, the first pass's first."""
    numbers = []
    for n in (network.n, network.n - options.fewer):
        numbers += [n + network.m, *([n] if options.micro_batches > 1 else [])]
    return numbers


def ambiguous(network: Network, options: Options) -> bool:
    """Whether a first dimension that is not the rows' may be taken for them."""
    return any(size % rows == 0 for size in (network.T, D) for rows in numbers_of_rows(network, options))


def named(model: nn.Module, message: str) -> bool:
    """Whether a message names a layer or a parameter of the model."""
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters()) if name}
    return any(f"'{name}'" in message for name in names)


def outcome(network: Network, options: Options) -> str:
    """Return "exact", or the reason of a refusal that is allowed; raises for anything else."""
    try:
        check_exact(network, options)
    except REFUSALS as error:
        message = str(error)
        reason = next((each for each in AMBIGUITIES if each in message), None)
        if reason is None or not named(network.build(), message) or not ambiguous(network, options):
            raise
        return reason
    return "exact"


def test_drawn_networks() -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=SEED is None,
        database=None,
        deadline=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def check(case: tuple[Network, Options]) -> None:
        network, options = case
        assume(not known(network, options))
        result = outcome(network, options)
        seen[result] += 1
        event(result)

    (check if SEED is None else seed(int(SEED))(check))()
    print(seen)
    assert seen["exact"] >= 0.8 * seen.total(), seen
