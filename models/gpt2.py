"""GPT-2: its published sizes, and the model from tokens to losses."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from foundation.errors import ConfigError
from ghostEngines import CrossEntropyHead

# Sizes as published (Radford et al. 2019); GPT2-Tiny is for tests and quick looks.
ARCHITECTURES = {
    "GPT2-Tiny": {"n_layer": 2, "n_head": 4, "n_embd": 128},
    "GPT2-Small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "GPT2-Medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "GPT2-Large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
}
VOCABULARY = 50304  # 50257 rounded up to a multiple of 128, which makes the head's products faster
POSITIONS = 1024
DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


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


class CausalLM(nn.Module):
    """A Hugging Face GPT-2 whose forward goes from tokens to losses: embedding, blocks, and the head fused
    with its loss.

    `hf` stays a GPT2LMHeadModel under its own parameter names, so that `hf.save_pretrained` writes what
    `GPT2LMHeadModel.from_pretrained` reads; only its `lm_head` is a CrossEntropyHead.
    """

    def __init__(self, hf: GPT2LMHeadModel) -> None:
        super().__init__()
        check_dropout(hf.config)
        self.checkpointing = False
        for block in hf.transformer.h:
            block.mlp = FrugalMLP(block.mlp)
        if hf.config._attn_implementation != "sdpa":
            raise ConfigError(
                f"the model's attention is {hf.config._attn_implementation}, which is not causal by itself: "
                "load it "
                'with attn_implementation="sdpa"'
            )
        head = CrossEntropyHead(hf.config.n_embd, hf.config.vocab_size)
        head.weight = hf.lm_head.weight  # the embedding's own weight where the two are tied
        hf.lm_head = head
        self.hf = hf

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the losses (N,) in nats per token of token ids x (N, T) and the ids y (N, T) that follow them, -100
        for none.

        Hugging Face's own forward searches the position ids for packed sequences, a device sync in every step.
        Without a mask its blocks attend causally.
        """
        gpt = self.hf.transformer
        positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        hidden = gpt.wte(x) + gpt.wpe(positions)  # (N, T, d)
        for block in gpt.h:
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        losses: Tensor = self.hf.lm_head(gpt.ln_f(hidden), y)
        return losses


def check_dropout(config: GPT2Config) -> None:
    """Raise ConfigError for a configuration with dropout: validation rows would change the masks of the train rows,
    and the scores would be of a random model."""
    for name in DROPOUT_FIELDS:
        if getattr(config, name) != 0:
            raise ConfigError(f"the model's configuration has {name}={getattr(config, name)}: set it to 0.0")


def architecture_config(architecture: str) -> GPT2Config:
    """Return the Hugging Face configuration of one of ARCHITECTURES."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        # GPT-2's own activation, gelu_new, is this function written out in five operations
        activation_function="gelu_pytorch_tanh",
        **dict.fromkeys(DROPOUT_FIELDS, 0.0),
        **ARCHITECTURES[architecture],
    )
