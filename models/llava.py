"""LLaVA (Liu et al. 2023, arXiv 2304.08485 and 2310.03744): a vision tower, a projector of two layers, and a language
model in whose rows the projected image stands. The vision tower is frozen.
"""

from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from models.family import Family
from models.llama import SIZES as LLAMA_SIZES

PROJECTOR = "multi_modal_projector"
VISION = "vision_tower"

# LLaVA-Tiny is for tests and quick looks: 6 x 6 patches of an image, and GPT-2's vocabulary, padded.
SIZES: dict[str, dict[str, Any]] = {
    "LLaVA-Tiny": {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 48,
            "patch_size": 8,
        },
        "text_config": LLAMA_SIZES["Llama-Tiny"] | {"vocab_size": 50304, "max_position_embeddings": 2048},
        "image_token_index": 50303,
        "image_seq_length": 36,
    },
    "LLaVA-1.5-7B": {
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
        },
        "image_token_index": 32000,
        "image_seq_length": 576,
    },
}


def llava_config(size: Mapping[str, Any]) -> LlavaConfig:
    """Return the configuration of one of SIZES."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(attention_dropout=0.0, **size["vision_config"]),
        text_config=LlamaConfig(
            rms_norm_eps=1e-5, tie_word_embeddings=False, attention_dropout=0.0, **size["text_config"]
        ),
        image_token_index=size["image_token_index"],
        image_seq_length=size["image_seq_length"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


LLAVA = Family(
    "llava",
    LlavaForConditionalGeneration,
    SIZES,
    llava_config,
    corpus="demo",
    frozen=(VISION,),
    parts={"projector": PROJECTOR},
    images=True,
)
