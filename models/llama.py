"""Llama-style models (Touvron et al. 2023, arXiv 2302.13971): rotary positions, RMS norms, a gated MLP.

The sizes of 60M and 130M are those that papers on memory-efficient training compare by (ReLoRA, arXiv 2307.05695;
GaLore, arXiv 2403.03507): 58,073,600 and 134,105,856 parameters. In Llama-Tiny two query heads share a key head
(grouped-query attention).
"""

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from models.family import Family

SIZES = {
    "Llama-Tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "Llama-60M": {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "Llama-130M": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
}
VOCABULARY = 32000  # of Llama's own tokenizer, and of the public comparisons


def llama_config(size: Mapping[str, Any]) -> LlamaConfig:
    """Return the configuration of one of SIZES."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        **size,
    )


LLAMA = Family("llama", LlamaForCausalLM, SIZES, llama_config, corpus="demo_bpe")
