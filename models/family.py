"""What a recipe for a family of models says. Everything else is common to all of them (causal_lm.py)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def unchanged(model: PreTrainedModel) -> None:
    """Leave the model as Hugging Face made it."""


@dataclass(frozen=True)
class Family:
    """A family of models in the sizes in which it was published.

    model_type: Hugging Face's name of it, as in a config.json.
    model: Hugging Face's class.
    sizes: what distinguishes each architecture of the family in its configuration.
    config: makes the configuration of one of them.
    corpus: the demo corpus whose tokens its vocabulary has (data/{corpus} of a checkout).
    frozen: names of the modules whose parameters are never trained.
    parts: what `--train_only` can name, and the module that it is.
    images: whether a row has an image besides its tokens.
    adapt: changes modules of a model in place, and neither its parameters' names nor what it computes.
    """

    model_type: str
    model: type[PreTrainedModel]
    sizes: Mapping[str, Mapping[str, Any]]
    config: Callable[[Mapping[str, Any]], PreTrainedConfig]
    corpus: str
    frozen: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    images: bool = False
    adapt: Callable[[PreTrainedModel], None] = unchanged
