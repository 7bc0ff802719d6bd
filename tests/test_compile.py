"""Compiled blocks of a Hugging Face model: one graph for all of them under the engine, one without gradients."""

import pytest
import torch
from cases import tiny_llama, token_rows
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ghostEngines import AttachError, GradDotProdEngine, per_sample_losses


@pytest.mark.usefixtures("compiled_eagerly")
def test_a_llama_has_two_graphs_and_no_breaks() -> None:
    """The first step is not compiled, since the guard cannot look into compiled code; the scores are the same."""
    model, (x, y) = tiny_llama(3), token_rows()

    def dots() -> list[Tensor]:
        engine = GradDotProdEngine(model, 2)
        found: list[Tensor] = []
        engine.attach()
        for _ in range(2):
            model.zero_grad()
            engine.joint_loss(
                per_sample_losses(lambda x: model(input_ids=x, use_cache=False), x, y)
            ).backward()
            engine.prepare_gradients()
            found.append(engine.dot_products())
        engine.detach()
        return found

    eager = dots()
    torch._dynamo.reset()
    counters.clear()
    for layer in model.model.layers:
        layer.compile()
    compiled = dots()
    with torch.no_grad():
        model(input_ids=x, use_cache=False)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for mine, want in zip(compiled, eager, strict=True):
        assert torch.allclose(mine, want, rtol=1e-4)


@pytest.mark.usefixtures("compiled_eagerly")
def test_a_model_compiled_as_a_whole_is_refused() -> None:
    """Also where the engine has the model itself, and only its caller compiled it."""
    model, (x, y) = tiny_llama(), token_rows()
    whole = torch.compile(model, backend="aot_eager")
    assert isinstance(whole, nn.Module)
    with GradDotProdEngine(model, 2), pytest.raises(RuntimeError, match=r"block\.compile\(\)"):
        per_sample_losses(lambda x: whole(input_ids=x, use_cache=False), x, y)
    with pytest.raises(AttachError, match=r"block\.compile\(\)"):
        GradDotProdEngine(whole, 2).attach()
    model.compile()
    with pytest.raises(AttachError, match=r"block\.compile\(\)"):
        GradDotProdEngine(model, 2).attach()
