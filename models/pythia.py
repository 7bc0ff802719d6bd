"""Pythia (Biderman et al. 2023, arXiv 2304.01373): GPT-NeoX with a quarter of each head rotated, attention and MLP
side by side on one residual stream, and a head of its own."""

from collections.abc import Mapping
from typing import Any

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from models.family import Family

# layers, width, heads
SIZES = {
    f"Pythia-{name}": {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    for name, (layers, width, heads) in {
        "14m": (6, 128, 4),
        "31m": (6, 256, 8),
        "70m": (6, 512, 8),
        "160m": (12, 768, 12),
        "410m": (24, 1024, 16),
        "1b": (16, 2048, 8),
        "1.4b": (24, 2048, 16),
    }.items()
}
VOCABULARY = 50304  # the tokenizer has 50277 ids; padded as published


def pythia_config(size: Mapping[str, Any]) -> GPTNeoXConfig:
    """Return the configuration of one of SIZES."""
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        intermediate_size=4 * size["hidden_size"],
        hidden_act="gelu",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        layer_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        **size,
    )


PYTHIA = Family("gpt_neox", GPTNeoXForCausalLM, SIZES, pythia_config, corpus="demo")
