"""A causal language model of any family, from tokens to losses, with the head fused with its loss.

What one family needs beyond this is in its own file; nothing here knows a family.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from foundation.errors import ConfigError
from ghostEngines import CrossEntropyHead, per_sample_losses
from models.architectures import BY_TYPE

# PyTorch's attention as Hugging Face calls it, registered without a mask: it is causal by itself then. For its
# own names Hugging Face searches the position ids for packed sequences, a device sync in every step.
UNMASKED = "causal_sdpa"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)

# Numbers of a configuration that are dropout; those of heads for classification are not the model's.
NO_DROPOUT = ("summary_", "classifier_")
PROBE = 8  # tokens, and
LARGEST = 100.0  # the largest logit, of the pass that shows what a model does with its output layer's result


class CausalLM(nn.Module):
    """A Hugging Face model whose forward goes from tokens to losses.

    `hf` stays what it was under its own parameter names, so that `hf.save_pretrained` writes what its auto class
    reads; only its output layer is a CrossEntropyHead, where its logits are no more than that layer's product.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        check_dropout(hf.config)
        self.fused = has_plain_head(hf)
        if hf.config.get_text_config().model_type in BY_TYPE:  # causal throughout, without windows
            hf.set_attn_implementation(UNMASKED)
        if hf.config.model_type in BY_TYPE:
            BY_TYPE[hf.config.model_type].adapt(hf)
        if self.fused:
            hf.set_output_embeddings(fused_head(hf))
        self.hf = hf

    def forward(self, x: Tensor, y: Tensor, images: Tensor | None = None) -> Tensor:
        """Return the losses (N,) in nats per token.

        Args:
            x: (N, T) token ids.
            y: (N, T) the ids that follow them, -100 for none.
            images: (N, 3, height, width) for a model that takes one image a row.
        """
        inputs = {} if images is None else {"pixel_values": images}
        if not self.fused:
            return per_sample_losses(lambda x: self.hf(input_ids=x, use_cache=False, **inputs), x, y)
        hidden = self.hf.base_model(input_ids=x, use_cache=False, **inputs).last_hidden_state  # (N, T, d)
        losses: Tensor = self.hf.get_output_embeddings()(hidden, y)
        return losses

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model has a row for."""
        return int(self.hf.config.get_text_config().vocab_size)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the model, in order: what Hugging Face keeps on one device."""
        return blocks_of(self.hf)


def blocks_of(hf: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks of a Hugging Face model, in order. Raises ConfigError if it does not name them."""
    names = hf._no_split_modules or ()
    found = [module for module in hf.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(
            f"{type(hf).__name__} does not name its blocks (_no_split_modules): --compile and --parallel fsdp need "
            "them; leave them out"
        )
    return found


def fused_head(hf: PreTrainedModel) -> CrossEntropyHead:
    """Return a head with the model's own output weight, which is the embedding's where the two are tied."""
    weight = hf.get_output_embeddings().weight
    with torch.device("meta"):
        head = CrossEntropyHead(weight.shape[1], weight.shape[0])
    head.weight = weight
    return head


@torch.no_grad()
def has_plain_head(hf: PreTrainedModel) -> bool:
    """Return whether the logits are the last hidden state times the output weight: neither scaled, capped nor with a
    bias, which the fused head would leave out.

    Known families have such a head. In another model the output layer's result is replaced by large numbers for one
    pass, which must come out as the logits, and what it was given must be the last hidden state.
    """
    if hf.config.model_type in BY_TYPE:
        return True
    head: nn.Module = hf.get_output_embeddings()
    if type(head) is not nn.Linear or len(list(head.parameters())) > 1:  # a bias
        return False
    given: list[Tensor] = []
    numbers = torch.linspace(-LARGEST, LARGEST, PROBE * len(head.weight), device=hf.device)
    numbers = numbers.to(head.weight.dtype).view(1, PROBE, -1)

    def replaced(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given.append(inputs[0])
        return numbers

    training, x = hf.training, torch.arange(PROBE, device=hf.device)[None] % len(head.weight)
    hf.eval()
    with head.register_forward_hook(replaced):
        logits = hf(input_ids=x, use_cache=False).logits
    hidden = hf.base_model(input_ids=x, use_cache=False).last_hidden_state
    hf.train(training)
    untouched = logits.shape == numbers.shape and torch.equal(logits.to(numbers.dtype), numbers)
    return untouched and len(given) == 1 and torch.equal(given[0], hidden)


def dropout_fields(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str, float]]:
    """Yield every number of the configuration, and of those within it, that is a dropout above 0: what holds it, its
    name and value."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from dropout_fields(value)
        elif _is_dropout(name, value):
            yield config, name, value


def _is_dropout(name: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and value != 0
    return number and ("drop" in name) and not name.startswith(NO_DROPOUT)


def check_dropout(config: PreTrainedConfig) -> None:
    """Raise ConfigError for a configuration with dropout: validation rows would change the masks of the train rows,
    and the scores would be of a random model."""
    for _, name, value in dropout_fields(config):
        raise ConfigError(f"the model's configuration has {name}={value}: set it to 0.0")
