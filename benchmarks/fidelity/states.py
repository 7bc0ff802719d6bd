"""Small language models in the middle of their training, on real text: where one step's effects are measured."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from benchmarks.experiment import SPLITS
from data_processing.shards import list_shards
from ghostEngines import GradDotProdEngine
from models.causal_lm import CausalLM
from models.gpt2 import gpt2_config

N, M, T = 12, 4, 64  # train rows, validation rows, tokens of a row
WARMUP = 20  # steps in which the learning rate rises
OLDEST = 16  # how many steps back validation gradients are kept
Rows = tuple[Tensor, Tensor]
Optimizer = Literal["AdamW", "SGD"]


@dataclass(frozen=True)
class Setting:
    """How a model is trained."""

    optimizer: Optimizer
    lr: float
    clip: float  # largest norm of the gradient; 0: it is not clipped
    seed: int
    layers: int = 2
    width: int = 64
    vocabulary: int = 8192

    @property
    def name(self) -> str:
        clip = "clipped" if self.clip else "unclipped"
        return f"{self.optimizer}-{self.lr:g}-{clip}-{self.layers}x{self.width}-seed{self.seed}"


class Corpus:
    """Rows of tokens from a folder of shards, drawn at random; the most frequent ids keep their rank as id.

    All ids beyond the vocabulary become the last one.
    """

    def __init__(self, folder: Path, vocabulary: int) -> None:
        """Read all splits; at most a million tokens of each domain."""
        splits = {
            split: [np.array(shard.tokens[:1_000_000], np.int64) for shard in list_shards(folder, split)]
            for split in SPLITS
        }
        counts = np.bincount(np.concatenate(splits["train"]), minlength=1 << 16)
        ids = np.empty_like(counts)
        ids[np.argsort(-counts, kind="stable")] = np.arange(len(counts)).clip(max=vocabulary - 1)
        self._domains = {
            split: [ids[domain] for domain in domains if len(domain) > T + 1]
            for split, domains in splits.items()
        }

    def train_rows(self, setting: Setting, t: int) -> Rows:
        """Return the rows of step t of a setting."""
        return self.rows("train", N, seed=setting.seed * 1_000_003 + t)

    def rows(self, split: str, count: int, seed: int) -> Rows:
        """Return x and y (count, T), each row of a random domain and place."""
        draw, domains = np.random.default_rng(seed), self._domains[split]
        chosen = []
        for _ in range(count):
            domain = domains[draw.integers(len(domains))]
            start = draw.integers(len(domain) - T - 1)
            chosen.append(domain[start : start + T + 1])
        tokens = torch.from_numpy(np.stack(chosen))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@dataclass
class State:
    """A model before step t, in float64, with its optimizer, and the rows of the step."""

    setting: Setting
    t: int  # number of the step, from 1
    model: Any  # CausalLM
    optimizer: torch.optim.Optimizer
    train: Rows
    validation: Rows
    gradients: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)
    """Validation gradients by point, "current" or "lookahead": the latest first, then those of earlier steps."""

    def losses(self, rows: Rows) -> Callable[[], Tensor]:
        """Return a function that calls the model and returns the rows' losses."""
        return lambda: self.model(*rows)


def new_model(setting: Setting) -> CausalLM:
    """Return a freshly initialised GPT-2 of the setting's size."""
    torch.manual_seed(setting.seed)
    sizes = {"n_layer": setting.layers, "n_head": setting.width // 32, "n_embd": setting.width}
    config = gpt2_config(sizes)
    config.vocab_size, config.n_positions = setting.vocabulary, T
    return CausalLM(GPT2LMHeadModel(config))


def new_optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    if setting.optimizer == "SGD":
        return torch.optim.SGD(model.parameters(), lr=setting.lr)
    return torch.optim.AdamW(model.parameters(), lr=setting.lr, betas=(0.9, 0.95), weight_decay=0.1)


def clip(model: nn.Module, largest: float) -> float:
    """Clip the gradients to a norm and return the factor."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    factor = min(1.0, largest / (norm.item() + 1e-6)) if largest else 1.0
    torch._foreach_mul_(gradients, factor)
    return factor


def set_rate(optimizer: torch.optim.Optimizer, setting: Setting, t: int) -> None:
    """Set the learning rate of step t, counted from 1: it rises for WARMUP steps and stays."""
    for group in optimizer.param_groups:
        group["lr"] = setting.lr * min(1.0, t / WARMUP)


def train(
    setting: Setting, corpus: Corpus, stops: tuple[int, ...], advance: Callable[[], None]
) -> Iterator[State]:
    """Train a model and yield its state before each of the steps in `stops`, numbered from 1, in order.

    Args:
        advance: called after each step.
    """
    model = new_model(setting)
    optimizer = new_optimizer(model, setting)
    validation = corpus.rows("val", M, seed=setting.seed)
    gradients: dict[str, list[dict[str, Tensor]]] = {"current": [], "lookahead": []}
    for t in range(1, max(stops) + 1):
        set_rate(optimizer, setting, t)
        if any(stop - OLDEST < t <= stop for stop in stops):
            for point, each in gradients.items():
                each.insert(0, validation_gradient(model, optimizer, validation, point))
                del each[OLDEST:]
        rows = corpus.train_rows(setting, t)
        if t in stops:
            yield in_float64(State(setting, t, model, optimizer, rows, validation, gradients))
        model(*rows).mean().backward()
        clip(model, setting.clip)
        optimizer.step()
        optimizer.zero_grad()
        advance()


def validation_gradient(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, point: str
) -> dict[str, Tensor]:
    engine = GradDotProdEngine(model, len(rows[0]), direction="auto")
    engine.attach(optimizer)
    found, _ = engine.validation_gradient(lambda: model(*rows), lookahead=point == "lookahead")
    engine.detach()
    return found


def in_float64(state: State) -> State:
    """Return a copy of a state in float64."""
    model = deepcopy(state.model).double()
    optimizer = new_optimizer(model, state.setting)
    optimizer.load_state_dict(state.optimizer.state_dict())
    gradients = {
        point: [{name: g.double() for name, g in one.items()} for one in each]
        for point, each in state.gradients.items()
    }
    return replace(state, model=model, optimizer=optimizer, gradients=gradients)
