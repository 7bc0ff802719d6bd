"""Architectures, initial weights, precision, weight decay and the learning-rate schedule."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import start, write_shards
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)

from benchmarks.oracle import row_loss
from config_file import TrainingConfig, resolve
from model_setup import Precision, build_model, build_optimizer, load_model
from models.architectures import ARCHITECTURES, architecture_config
from models.causal_lm import CausalLM
from training_loop import learning_rate

# Parameters as published: of GPT-2 with its 50257 ids (openai/gpt2*; the rows added by padding are counted apart);
# of Pythia, Biderman et al. 2023; of the Llamas, see models/llama.py.
PUBLISHED = {
    "GPT2-Small": 124_439_808,
    "GPT2-Medium": 354_823_168,
    "GPT2-Large": 774_030_080,
    "GPT2-XL": 1_557_611_200,
    "Pythia-14m": 14_067_712,
    "Pythia-31m": 30_494_720,
    "Pythia-70m": 70_426_624,
    "Pythia-160m": 162_322_944,
    "Pythia-410m": 405_334_016,
    "Pythia-1b": 1_011_781_632,
    "Pythia-1.4b": 1_414_647_808,
    "Llama-60M": 58_073_600,
    "Llama-130M": 134_105_856,
    "LLaVA-1.5-7B": 7_063_427_072,
}
OF_OUR_OWN = {"GPT2-Tiny", "Llama-Tiny", "LLaVA-Tiny"}  # for tests and quick looks


def tiny_config(**given: object) -> TrainingConfig:
    return resolve(TrainingConfig(architecture="GPT2-Tiny", device="cpu", **given), {})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny() -> CausalLM:
    return build_model(tiny_config(model_dtype="float64"))


def small_hf(**given: object) -> GPT2LMHeadModel:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 12}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes | none | given)).double()


# ---- architectures


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_as_published(name: str) -> None:
    with torch.device("meta"):
        model = CausalLM(ARCHITECTURES[name].model(architecture_config(name)))
    padding = (50304 - 50257) * model.hf.config.hidden_size if name.startswith("GPT2") else 0
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name] + padding
    layers = [block for block in model.blocks() if "vision_tower" not in names_of(model)[id(block)]]
    assert len(layers) == model.hf.config.get_text_config().num_hidden_layers


def test_all_architectures_of_the_command_line_are_there() -> None:
    assert ARCHITECTURES.keys() == PUBLISHED.keys() | OF_OUR_OWN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["GPT2-Tiny", "Pythia-14m", "Llama-Tiny"])
def test_losses_are_those_of_hugging_faces_model(name: str, dtype: torch.dtype) -> None:
    """Judged in float64, whose own rounding is far below both bounds."""
    torch.manual_seed(2)
    hf = ARCHITECTURES[name].model(architecture_config(name)).to(dtype)
    x, y = torch.randint(hf.config.vocab_size, (2, 2, 24))
    with torch.no_grad():
        want = torch.stack(
            [row_loss(logits.double(), row) for logits, row in zip(hf(x).logits, y, strict=True)]
        )
        got = CausalLM(hf)(x, y)
    torch.testing.assert_close(got.double(), want, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("given", [{"final_logit_softcapping": 30.0}, {"final_logit_softcapping": None}])
def test_a_head_is_fused_where_logits_are_its_product_alone(
    given: dict[str, Any], dtype: torch.dtype
) -> None:
    """Small logits that a cap hardly changes are no reason to leave it out."""
    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, **given,
    )  # fmt: skip
    hf = Gemma2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        hf.lm_head.weight.zero_()
    assert CausalLM(hf).fused == (given["final_logit_softcapping"] is None)


def test_a_window_of_llavas_language_model_is_kept() -> None:
    """It is not of a family that attends to everything before a token."""
    text = MistralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4,
        patch_size=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=59, image_seq_length=4)
    torch.manual_seed(3)
    hf = LlavaForConditionalGeneration(config).double()
    x, y, images = torch.randint(50, (2, 24)), torch.randint(50, (2, 24)), torch.randn(2, 3, 4, 4).double()
    x[:, :4] = 59
    with torch.no_grad():
        logits = hf(input_ids=x, pixel_values=images).logits
        want = torch.stack([row_loss(each, row) for each, row in zip(logits, y, strict=True)])
        torch.testing.assert_close(CausalLM(hf)(x, y, images), want, rtol=1e-10, atol=0)


def test_input_and_output_layer_share_their_weight(tiny: CausalLM) -> None:
    assert tiny.hf.lm_head.weight is tiny.hf.transformer.wte.weight
    assert tiny.hf.lm_head.weight.shape == (50304, 128)
    assert "lm_head.weight" not in dict(tiny.hf.named_parameters())


def test_initial_weights_are_gpt2s(tiny: CausalLM) -> None:
    block = tiny.hf.transformer.h[0]
    assert tiny.hf.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.02)
    shrunk = 0.02 / math.sqrt(2 * 2)  # output layers of 2 blocks, each with 2 of them
    for layer in (block.attn.c_proj, block.mlp.c_proj):
        assert layer.weight.std().item() == pytest.approx(shrunk, rel=0.02)


def test_the_seed_alone_decides_the_initial_weights() -> None:
    config = tiny_config(seed=3)
    models = [build_model(config), build_model(replace(config, method="Regular", batch_size=7))]
    same = zip(*(model.parameters() for model in models), strict=True)
    assert all(torch.equal(first, second) for first, second in same)
    other = build_model(replace(config, seed=4))
    assert not torch.equal(next(other.parameters()), next(models[0].parameters()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_forward_is_hugging_faces_model_and_the_mean_over_targets(tied: bool, activation: str) -> None:
    torch.manual_seed(1)
    hf = small_hf(tie_word_embeddings=tied, activation_function=activation)
    x, y = torch.randint(50, (3, 12)), torch.randint(50, (3, 12))
    y[1, 5:] = -100
    want = torch.stack([row_loss(logits, row) for logits, row in zip(hf(x).logits, y, strict=True)])
    assert torch.allclose(CausalLM(hf)(x, y), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("field", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}=0\.1: set it to 0\.0"):
        CausalLM(small_hf(**{field: 0.1}))


def test_blocks_beyond_the_positions_are_refused(tiny: CausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--block_size 1025 is longer than the 1024 positions of GPT2-Tiny"):
        build_model(tiny_config(block_size=1025))


def test_blocks_beyond_the_positions_of_a_saved_model_are_refused(tmp_path: Path) -> None:
    small_hf().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--block_size 13 is longer than the 12 positions"):
        load_model(tmp_path, tiny_config(block_size=13))


# ---- precision


@pytest.mark.parametrize(
    ("model_dtype", "train_dtype"),
    [("float32", "float32"), ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "bfloat16"),
     ("float64", "float64")],
)  # fmt: skip
def test_precision(model_dtype: str, train_dtype: str) -> None:
    config = tiny_config(model_dtype=model_dtype, train_dtype=train_dtype)
    precision = Precision.of(config)
    layer = nn.Linear(2, 2, dtype=precision.model_dtype)
    with precision.autocast():
        output = layer(torch.ones(2, 2, dtype=precision.model_dtype))
    assert output.dtype == getattr(torch, train_dtype)
    assert precision.grad_scaler().is_enabled() == (train_dtype == "float16")
    assert {p.dtype for p in build_model(config).parameters()} == {getattr(torch, model_dtype)}


@pytest.mark.usefixtures("compiled_eagerly")
def test_compiled_blocks_make_the_same_scores_and_two_graphs(tmp_path: Path) -> None:
    """One graph for all blocks under the engine, one for all of them in evaluation, however often the two
    take turns. Without a C++ compiler: the graphs are run as PyTorch traced them."""
    data = write_shards(tmp_path / "shards")
    counters.clear()
    runs = [
        start(data, tmp_path, run_name=name, max_steps=3, eval_interval=1, **flags)
        for name, flags in (("eager", {}), ("compiled", {"compile": True}))
    ]
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    eager, compiled = (run.scores() for run in runs)
    np.testing.assert_allclose(compiled.dot_product, eager.dot_product, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(compiled.train_loss, eager.train_loss, rtol=1e-5, atol=1e-8)
    for got, want in zip(*(run.evaluations() for run in runs), strict=True):
        assert got["loss/val"] == pytest.approx(want["loss/val"], rel=1e-5)


# ---- optimizer and schedule


def test_weight_decay_is_on_matrices_only(tiny: CausalLM) -> None:
    """A step without a gradient moves a parameter by its weight decay."""
    model = build_model(tiny_config(model_dtype="float64"))
    config = tiny_config(learning_rate=0.5, weight_decay=0.2, betas=(0.8, 0.9))
    optimizer = build_optimizer(model, config)
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        want = 1 - 0.5 * 0.2 if name.endswith("weight") and ".ln_" not in name else 1.0
        assert torch.allclose(parameter, torch.full_like(parameter, want)), name


def test_frozen_parameters_are_not_the_optimizers() -> None:
    model = CausalLM(small_hf())
    model.hf.transformer.wpe.weight.requires_grad_(False)
    optimizer = build_optimizer(model, tiny_config(optimizer="SGD", weight_decay=0.3))
    assert isinstance(optimizer, torch.optim.SGD)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    want = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(held) == sorted(want)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    config = tiny_config(learning_rate=1.0, min_lr=0.2, warmup_step=4, lr_decay_steps=24, max_steps=30)
    rates = [learning_rate(config, step) for step in range(30)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4 + 10] == pytest.approx(0.6)  # half way: the mean of both ends
    assert rates[4 + 5] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(first > second for first, second in pairwise(rates[4:25]))
    assert rates[24:] == [0.2] * 6


def test_a_schedule_without_warm_up_and_one_that_is_all_warm_up() -> None:
    config = tiny_config(learning_rate=1.0, warmup_step=0, max_steps=10)
    assert learning_rate(config, 0) == 1.0 and learning_rate(config, 10) == pytest.approx(0.1)
    config = tiny_config(learning_rate=1.0, warmup_step=100, max_steps=20)
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates == pytest.approx([(step + 1) / 101 for step in range(20)])
