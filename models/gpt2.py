"""GPT-2 (Radford et al. 2019): learned positions, tied embedding and head."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from models.family import Family

# As published; GPT2-Tiny is for tests and quick looks.
SIZES = {
    "GPT2-Tiny": {"n_layer": 2, "n_head": 4, "n_embd": 128},
    "GPT2-Small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "GPT2-Medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "GPT2-Large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "GPT2-XL": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
VOCABULARY = 50304  # 50257 rounded up to a multiple of 128, which makes the head's products faster
POSITIONS = 1024
DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def gpt2_config(size: Mapping[str, Any]) -> GPT2Config:
    """Return the configuration of one of SIZES."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        # GPT-2's own activation, gelu_new, is this function written out in five operations
        activation_function="gelu_pytorch_tanh",
        **dict.fromkeys(DROPOUT_FIELDS, 0.0),
        **size,
    )


class FrugalMLP(nn.Module):
    """GPT-2's MLP, with the same parameter names, that keeps less for the backward pass.

    The two widest tensors of a block are the activation function's input and output. It keeps the input and
    recomputes the output, which costs little and saves a fifth of a block's memory.
    """

    def __init__(self, mlp: GPT2MLP) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = mlp.c_fc, mlp.act, mlp.c_proj
        self.frugal = True  # False where checkpointing or a compiler decides what is kept

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the MLP of hidden (N, T, d), of the same shape."""
        before = self.c_fc(hidden)
        after = self.act(before)
        if not (self.frugal and torch.is_grad_enabled()):
            return self._projected(after)
        storage = after.untyped_storage().data_ptr()

        def pack(kept: Tensor) -> Tensor | torch.Size:
            return kept.shape if kept.untyped_storage().data_ptr() == storage else kept

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.act(before.detach()).view(kept)

        with saved_tensors_hooks(pack, unpack):
            return self._projected(after)

    def _projected(self, after: Tensor) -> Tensor:
        hidden: Tensor = self.c_proj(after)
        return hidden


def adapt(model: PreTrainedModel) -> None:
    """Give every block a FrugalMLP."""
    for block in model.transformer.h:
        block.mlp = FrugalMLP(block.mlp)


GPT2 = Family("gpt2", GPT2LMHeadModel, SIZES, gpt2_config, corpus="demo", adapt=adapt)
