"""Models from folders in Hugging Face format: what is read, and what is refused and how."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import command, tree
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import main
from config_file import TrainingConfig, resolve
from foundation.errors import ConfigError
from model_setup import load_model

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT2-Tiny with a vocabulary of 50."""
    folder = tmp_path_factory.mktemp("saved") / "gpt2"
    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_head=4, n_embd=128, vocab_size=50, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "gpt2")


def load(folder: Path, **flags: Any) -> GPT2LMHeadModel:
    given: dict[str, Any] = {"architecture": "GPT2-Tiny", "device": "cpu", "block_size": 8} | flags
    return load_model(folder, resolve(TrainingConfig(**given), {}), drop_dropout=True).hf


Change = Callable[[Path], object]


def configured(**fields: object) -> Change:
    """Other fields in config.json; None: left out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))

    return change


def weights(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        path.unlink()
        save_file(tensors, path, {"format": "pt"})

    return change


def named(name: str, content: bytes | str) -> Change:
    """This file in the place of the weights."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def torch_saved(value: object) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(value, folder / "pytorch_model.bin")

    return change


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


WTE, LN = "transformer.wte.weight", "transformer.ln_f.weight"


@pytest.mark.parametrize(
    ("name", "case"),
    {
        "vocabulary": (
            configured(vocab_size=60),
            "model.safetensors: transformer.wte.weight has the shape (50, 128), config.json says (60, 128)",
        ),
        "inner size": (configured(n_inner=300), "has the shape (512,), config.json says (300,)"),
        "more weights": (
            weights(lambda w: w.update({"transformer.h.0.attn.lora": torch.ones(1)})),
            "has no transformer.h.0.attn.lora",
        ),
        "fewer weights": (
            weights(lambda w: w.pop(LN)),
            "model.safetensors: the model's transformer.ln_f.weight is missing",
        ),
        "wrapped names": (
            weights(lambda w: [w.update({f"module.{name}": w.pop(name)}) for name in list(w)]),
            "the model's transformer.wte.weight, ",
        ),
        "integers": (weights(lambda w: w.update({WTE: w[WTE].char()})), "is torch.int8: quantized"),
        "not finite": (
            weights(lambda w: w[WTE][3].fill_(float("nan"))),
            f"{WTE} has values that are not finite",
        ),
        "another head": (
            weights(lambda w: w.update({"lm_head.weight": w[WTE] + 1})),
            "lm_head.weight is not transformer.wte.weight",
        ),
        "LFS pointer": (
            named("model.safetensors", LFS),
            "model.safetensors is a Git LFS pointer in the place of the weights: run `git lfs pull`",
        ),
        "empty": (named("model.safetensors", b""), "model.safetensors is empty"),
        "truncated": (truncated, "model.safetensors is damaged, or no safetensors file"),
        "no weights": (
            lambda folder: (folder / "model.safetensors").unlink(),
            "has no weights: no model.safetensors and no pytorch_model.bin; it has config.json",
        ),
        "weights of TensorFlow": (
            named("tf_model.h5", b"x"),
            "it has config.json, generation_config.json, tf_model.h5",
        ),
        "LFS pointer, bin": (named("pytorch_model.bin", LFS), "pytorch_model.bin is a Git LFS pointer"),
        "empty bin": (named("pytorch_model.bin", b""), "pytorch_model.bin is empty"),
        "damaged bin": (named("pytorch_model.bin", b"PK\x03\x04 and so on"), "pytorch_model.bin is damaged"),
        "a list": (torch_saved([1, 2]), "pytorch_model.bin is no state dict"),
        "nested": (torch_saved({"model": {LN: torch.ones(128)}}), "pytorch_model.bin is no state dict"),
        "missing shard": (
            named("model.safetensors.index.json", '{"weight_map": {"a": "part.safetensors"}}'),
            "model.safetensors.index.json names part.safetensors, which is not there",
        ),
        "damaged index": (
            named("pytorch_model.bin.index.json", "{"),
            "pytorch_model.bin.index.json is not JSON",
        ),
        "index without a map": (named("model.safetensors.index.json", "{}"), "has no weight_map"),
        "config is not JSON": (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json is not JSON",
        ),
        "config is a list": (
            lambda folder: (folder / "config.json").write_text("[]"),
            "config.json is not a JSON object",
        ),
        "another type": (configured(model_type="llama"), "--architecture GPT2-Tiny has model_type gpt2, the model in "),
        "no type": (configured(model_type=None), "config.json: its model_type is None"),
        "a text for a number": (configured(n_embd="x"), "config.json: no model of type gpt2 can be made of it: "),
        "unknown activation": (
            configured(activation_function="x"),
            "config.json: no model of type gpt2 can be made of it: ",
        ),
        "heads that do not fit": (configured(n_head=3), "config.json: no model of type gpt2 can be made of it: "),
        "quantized": (configured(quantization_config={"load_in_8bit": True}), "the model is quantized"),
        "a run": (
            configured(method="Regular", run_name="a"),
            "is the folder of a run, not of a model: name its model, ",
        ),
        "nothing": (lambda folder: shutil.rmtree(folder), "there is no saved model in "),
    }.items(),
)  # fmt: skip
def test_what_cannot_be_read(name: str, case: tuple[Change, str], copy: Path) -> None:
    change, said = case
    change(copy)
    with pytest.raises(ConfigError) as error:
        load(copy)
    message = str(error.value)
    assert said in message and str(copy) in message and "\n" not in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_may_not_be_read(name: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not called damaged."""
    opens = Path.open

    def denying(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opens(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", denying)
    with pytest.raises(ConfigError, match=f"{name}: Permission denied$"):
        load(copy)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("raw", [True, False], ids=["pickle", "torch.save"])
def test_a_pickle_is_not_executed(
    raw: bool, data: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    executed = tmp_path / "executed"
    value = {"transformer.wte.weight": Malicious(executed)}
    (named("pytorch_model.bin", pickle.dumps(value)) if raw else torch_saved(value))(copy)
    before = tree(tmp_path)
    assert main.main(command(data, tmp_path / "results", init_from=copy)) == 2
    assert not executed.exists() and tree(tmp_path) == before
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith(
        f"main.py: error: {copy}/pytorch_model.bin is damaged, or holds something else than tensors"
    )
    assert "Traceback" not in err and out == ""


def bare(tensors: dict[str, Tensor]) -> None:
    """As the published GPT-2: names without the prefix, and with the masks."""
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.bin": list(tensors)[:3], "b.bin": list(tensors)[3:]}
    for file, names in parts.items():
        torch.save({name: tensors[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        weights(bare),
        in_shards,
        weights(lambda tensors: tensors.update({"lm_head.weight": tensors[WTE].clone()})),
    ],
    ids=["as saved", "as published", "in shards, as .bin", "with the tied head"],
)
def test_every_weight_is_the_files(change: Change, saved: Path, copy: Path) -> None:
    change(copy)
    model, want = load(copy), GPT2LMHeadModel.from_pretrained(saved)
    assert model.lm_head.weight is model.transformer.wte.weight
    for (name, got), other in zip(model.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(got, other), name


def test_an_untied_head_and_float64(copy: Path) -> None:
    """What float32 could not hold arrives."""
    weights(lambda tensors: tensors.update({"lm_head.weight": tensors[WTE].double() + 1e-12}))(copy)
    configured(tie_word_embeddings=False)(copy)
    model = load(copy, model_dtype="float64")
    difference = model.lm_head.weight - model.transformer.wte.weight
    assert difference.mean().item() == pytest.approx(1e-12, rel=1e-2)
