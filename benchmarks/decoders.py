"""Build tiny random models of transformers' decoder architectures, with every kind of layer."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

V, T, WINDOW = 40, 8, 3
SPREAD = 0.3  # standard deviation of every parameter: initial biases and norms, 0 and 1, could hide errors
Attention = Literal["eager", "sdpa"]

TOKENS = {"vocab_size": V, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
LLAMA = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {**TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
QWEN_SLIDING = {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}
MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.4,
}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEEPSEEK_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}
MAMBA = {"state_size": 4, "time_step_rank": 2, "hidden_size": 16, "num_hidden_layers": 2, **TOKENS}


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


@dataclass(frozen=True)
class Decoder:
    """One architecture."""

    name: str
    kind: str  # its model_type in transformers
    settings: dict[str, Any] = field(default_factory=dict)  # that differ from its default configuration
    can_tie: bool = True  # whether transformers can tie its embedding to its head
    unit: str | None = None  # class of modules to register as units; None: the engine needs none

    def published_tied(self) -> bool:
        """Return whether the default configuration ties the embedding to the head."""
        return bool(AutoConfig.for_model(self.kind).tie_word_embeddings)

    def attentions(self) -> tuple[Attention, ...]:
        """Return which of eager and sdpa attention the architecture has."""
        model: Any = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(self.kind))]
        return ("eager", "sdpa") if model._supports_sdpa else ("eager",)

    def build(self, tied: bool, attention: Attention = "eager") -> PreTrainedModel:
        """Return the model in float64 and in training mode, its parameters drawn. Call it inside `Float64`.

        Raises ValueError for a setting that the configuration does not know, or a model that is not tied as
        asked."""
        torch.manual_seed(0)
        known = AutoConfig.for_model(self.kind)
        unknown = [name for name in self.settings if not hasattr(known, name)]
        if unknown:
            raise ValueError(f"{self.name}: the configuration of {self.kind} has no {', '.join(unknown)}")
        config = AutoConfig.for_model(
            self.kind, **self.settings, tie_word_embeddings=tied, attn_implementation=attention
        )
        config._experts_implementation = "eager"  # the grouped products do not support float64
        config.dtype = torch.float64
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().train()
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        if is_tied != tied:
            raise ValueError(f"{self.name}: asked for tied={tied}, the model has tied={is_tied}")
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.normal_(std=SPREAD, generator=generator)
        return model


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits (N, T, V) of token ids (N, T)."""
    result: Tensor = model(input_ids=x, use_cache=False).logits
    return result


def data(rows: int) -> tuple[Tensor, Tensor]:
    """Return token ids x (rows, T), of which some repeat, and targets y (rows, T), padded at the end."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(3, V, (rows, T), generator=generator)
    x[:, : T // 2] = 3 + x[:, : T // 2] % 4
    y = torch.randint(V, (rows, T), generator=generator)
    for i in range(rows):
        y[i, T - i % (T - 2) :] = -100
    return x, y


class Float64:
    """Replace float32 by float64 in every call of a torch function, and as the default dtype.

    Norms, routers and rotary embeddings of transformers round to float32; with that, plain autograd itself is
    off by 2e-7. Backward passes are covered, too, although PyTorch runs them outside of the active modes.
    """

    def __enter__(self) -> None:
        run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

        def lifted_backward(*args: Any, **kwargs: Any) -> Any:
            with _Lift():
                return run_backward(*args, **kwargs)

        with ExitStack() as stack:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
            stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", lifted_backward))
            stack.enter_context(_Lift())
            self._leave = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._leave.close()


class _Lift(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        lifted = {name: _lifted(value) for name, value in (kwargs or {}).items()}
        return function(*map(_lifted, args), **lifted)


def _lifted(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


DECODERS = [
    Decoder("gpt2", "gpt2", {**GPT2, **NO_DROPOUT, "attn_pdrop": 0.0}),
    Decoder(
        "gpt-neo",
        "gpt_neo",
        {
            **without(LLAMA, "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
    ),
    Decoder("gpt-neox", "gpt_neox", {**without(LLAMA, "num_key_value_heads"), "num_attention_heads": 2}),
    Decoder("gpt-j", "gptj", {**GPT2, "rotary_dim": 4}),
    Decoder("gpt-bigcode", "gpt_bigcode", {**GPT2, **NO_DROPOUT, "attn_pdrop": 0.0}),
    Decoder("codegen", "codegen", {**without(GPT2, "pad_token_id"), "n_head": 4, "rotary_dim": 4}),
    Decoder("bloom", "bloom", {**TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    Decoder(
        "mpt",
        "mpt",
        {**TOKENS, "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 32},
    ),
    Decoder("phi", "phi", {**LLAMA, "qk_layernorm": True}),
    Decoder("olmo", "olmo", {**LLAMA, "clip_qkv": 2.0}),
    Decoder("stablelm", "stablelm", {**LLAMA, "num_attention_heads": 2}),
    Decoder(
        "stablelm-parallel",
        "stablelm",
        {
            **LLAMA,
            "num_attention_heads": 2,
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "use_qkv_bias": True,
        },
    ),
    Decoder("starcoder2", "starcoder2", {**LLAMA, "sliding_window": WINDOW}),
    Decoder("nanochat", "nanochat", LLAMA),
    Decoder(
        "modernbert-decoder",
        "modernbert-decoder",
        {
            **without(LLAMA, "num_key_value_heads"),
            **SLIDING,
            "cls_token_id": 3,
            "sep_token_id": 4,
            "local_attention": 2 * WINDOW,
        },
    ),
    Decoder("ctrl", "ctrl", {**GPT2, **NO_DROPOUT, "dff": 24}),
    Decoder("persimmon", "persimmon", without(LLAMA, "num_key_value_heads")),
    Decoder("llama", "llama", {**LLAMA, "head_dim": 4}),
    Decoder("llama-biases", "llama", {**LLAMA, "head_dim": 6, "attention_bias": True, "mlp_bias": True}),
    Decoder("mistral", "mistral", {**LLAMA, "head_dim": 4, "sliding_window": WINDOW}),
    Decoder("ministral", "ministral", {**LLAMA, **SLIDING, "head_dim": 4}),
    Decoder("qwen2", "qwen2", {**LLAMA, **QWEN_SLIDING}),
    Decoder("qwen3", "qwen3", {**LLAMA, **QWEN_SLIDING, "head_dim": 6}),
    Decoder("olmo2", "olmo2", LLAMA),
    Decoder("olmo3", "olmo3", {**LLAMA, **SLIDING}),
    Decoder(
        "smollm3",
        "smollm3",
        {
            **LLAMA,
            **without(SLIDING, "layer_types"),
            "use_sliding_window": True,
            "no_rope_layers": [1, 0],
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Decoder("granite", "granite", {**LLAMA, **MULTIPLIERS}),
    Decoder("glm4", "glm4", {**LLAMA, "head_dim": 8}),
    Decoder("phi3", "phi3", {**LLAMA, "sliding_window": WINDOW, "original_max_position_embeddings": 32}),
    Decoder("exaone4", "exaone4", {**LLAMA, **SLIDING}),
    Decoder("ernie4.5", "ernie4_5", {**LLAMA, "head_dim": 4, "use_bias": True}),
    Decoder("helium", "helium", {**LLAMA, "head_dim": 4}),
    Decoder("hunyuan", "hunyuan_v1_dense", {**LLAMA, "head_dim": 4}),
    Decoder("bitnet", "bitnet", LLAMA),
    Decoder(
        "seed-oss",
        "seed_oss",
        {**LLAMA, "head_dim": 4, "attention_dropout": 0.0, "residual_dropout": 0.0},
    ),
    Decoder("gemma", "gemma", {**LLAMA, "head_dim": 6}),
    Decoder("gemma2", "gemma2", {**LLAMA, **SLIDING, "head_dim": 6, "query_pre_attn_scalar": 6}),
    Decoder("gemma3", "gemma3_text", {**LLAMA, **SLIDING, "head_dim": 6, "query_pre_attn_scalar": 6}),
    Decoder("mixtral", "mixtral", {**LLAMA, "num_local_experts": 4, "sliding_window": WINDOW}),
    Decoder(
        "qwen3-moe",
        "qwen3_moe",
        {**LLAMA, **QWEN_EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    Decoder("olmoe", "olmoe", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    Decoder("granitemoe", "granitemoe", {**LLAMA, **MULTIPLIERS, "num_local_experts": 4}),
    Decoder("deepseek-v2", "deepseek_v2", {**LLAMA, **DEEPSEEK_EXPERTS, **LATENT_ATTENTION, "head_dim": 4}),
    Decoder(
        "deepseek-v3",
        "deepseek_v3",
        {**LLAMA, **DEEPSEEK_EXPERTS, **LATENT_ATTENTION, "n_group": 2, "topk_group": 1},
    ),
    Decoder("glm4-moe", "glm4_moe", {**LLAMA, **DEEPSEEK_EXPERTS, "use_qk_norm": True}),
    Decoder("dots1", "dots1", {**LLAMA, **DEEPSEEK_EXPERTS, **SLIDING}),
    Decoder(
        "minimax",
        "minimax",
        {
            **LLAMA,
            "num_local_experts": 4,
            "head_dim": 4,
            "block_size": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    Decoder(
        "gpt-oss",
        "gpt_oss",
        {**LLAMA, **SLIDING, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Decoder(
        "qwen2-moe",
        "qwen2_moe",
        {**LLAMA, **QWEN_EXPERTS, "shared_expert_intermediate_size": 12, "mlp_only_layers": [0]},
    ),
    Decoder(
        "qwen3-next",
        "qwen3_next",
        {
            **LLAMA,
            **QWEN_EXPERTS,
            "shared_expert_intermediate_size": 12,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_conv_kernel_dim": 3,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        unit="Qwen3NextGatedDeltaNet",
    ),
    Decoder(
        "opt",
        "opt",
        {
            **without(LLAMA, "intermediate_size", "num_key_value_heads"),
            "ffn_dim": 24,
            "word_embed_proj_dim": 16,
            "dropout": 0.0,
        },
    ),
    Decoder(
        "opt-350m",
        "opt",
        {
            **without(LLAMA, "intermediate_size", "num_key_value_heads"),
            "ffn_dim": 24,
            "word_embed_proj_dim": 8,
            "do_layer_norm_before": False,
            "dropout": 0.0,
        },
    ),
    Decoder(
        "dbrx",
        "dbrx",
        {
            **TOKENS,
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 16,
                "ffn_hidden_size": 24,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
        can_tie=False,
        unit="DbrxExperts",
    ),
    Decoder("cohere", "cohere", {**LLAMA, "use_qk_norm": True}),
    Decoder("cohere2", "cohere2", {**LLAMA, **SLIDING, "head_dim": 4}),
    Decoder("nemotron", "nemotron", {**LLAMA, "head_dim": 4}),
    Decoder(
        "xlstm",
        "xlstm",
        {
            **TOKENS,
            "hidden_size": 16,
            "embedding_dim": 16,
            "num_hidden_layers": 2,
            "num_blocks": 2,
            "num_heads": 2,
            "ffn_round_up_to_multiple_of": 8,
            "chunk_size": 4,
            "autocast_kernel_dtype": "float32",
        },
        can_tie=False,
    ),
    Decoder(
        "falcon",
        "falcon",
        {
            **without(LLAMA, "intermediate_size", "num_key_value_heads"),
            "num_attention_heads": 2,
            "ffn_hidden_size": 24,
        },
    ),
    Decoder(
        "falcon-new",
        "falcon",
        {
            **without(LLAMA, "intermediate_size", "num_key_value_heads"),
            "ffn_hidden_size": 24,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": True,
        },
    ),
    Decoder(
        "biogpt",
        "biogpt",
        {
            **without(LLAMA, "num_key_value_heads"),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    Decoder(
        "xglm",
        "xglm",
        {
            **TOKENS,
            "d_model": 16,
            "ffn_dim": 24,
            "num_layers": 2,
            "attention_heads": 2,
            "max_position_embeddings": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    Decoder(
        "mamba2",
        "mamba2",
        {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
        unit="Mamba2Mixer",
    ),
    Decoder(
        "rwkv",
        "rwkv",
        {
            **without(TOKENS, "pad_token_id"),
            "context_length": 32,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "attention_hidden_size": 16,
            "intermediate_size": 24,
        },
    ),
    Decoder(
        "bamba",
        "bamba",
        {
            **LLAMA,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 4,
            "mamba_chunk_size": 4,
        },
        unit="BambaMixer",
    ),
    Decoder(
        "recurrent-gemma",
        "recurrent_gemma",
        {
            **without(LLAMA, "max_position_embeddings"),
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "lru_width": 16,
            "attention_window_size": WINDOW,
            "head_dim": 8,
        },
    ),
    Decoder(
        "apertus",
        "apertus",
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    Decoder("diffllama", "diffllama", {**LLAMA, "head_dim": 4}),
    Decoder("doge", "doge", {**LLAMA, "keep_window_size": 4}),
    Decoder("mamba", "mamba", MAMBA, unit="MambaMixer"),
    Decoder("falcon-mamba", "falcon_mamba", MAMBA, unit="FalconMambaMixer"),
    Decoder(
        "jamba",
        "jamba",
        {
            **without(LLAMA, "max_position_embeddings"),
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "use_mamba_kernels": False,
        },
        unit="JambaMambaMixer",
    ),
    Decoder(
        "lfm2",
        "lfm2",
        {**LLAMA, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        unit="Lfm2ShortConv",
    ),
    Decoder(
        "zamba2",
        "zamba2",
        {
            **LLAMA,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "mamba_d_state": 4,
            "mamba_ngroups": 2,
            "n_mamba_heads": 4,
            "chunk_size": 4,
            "use_shared_attention_adapter": True,
            "adapter_rank": 2,
            "use_mem_rope": True,
            "add_bias_linear": True,
        },
        unit="Zamba2MambaMixer",
    ),
    Decoder(
        "gemma3n",
        "gemma3n_text",
        {
            **LLAMA,
            "num_hidden_layers": 4,
            "intermediate_size": [24] * 4,
            "head_dim": 6,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": V,
            "hidden_size_per_layer_input": 4,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
    ),
    Decoder("phimoe", "phimoe", {**LLAMA, "num_local_experts": 4}),
]
BY_NAME = {decoder.name: decoder for decoder in DECODERS}
