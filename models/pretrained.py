"""A GPT-2 in a folder in Hugging Face format: config.json, and weights that are read without unpickling.

Weights are safetensors, or what torch.load(weights_only=True) accepts, which makes tensors only. Every weight
of the model must be there, with the shape that config.json says, and every weight of the files must be the
model's.
"""

import json
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.initialization import no_init_weights

from foundation.errors import ConfigError, file_errors

# In the order in which they are looked for, as transformers does.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PREFIX = "transformer."
# The causal mask, which older versions of transformers saved with the weights.
MASKS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
SHOWN = 3  # names in a message


def read_config(folder: Path) -> GPT2Config:
    """Return the configuration of a saved GPT-2. Raises ConfigError, naming the file and what is wrong in it."""
    path = folder / "config.json"
    with file_errors(path, ConfigError):
        there = path.is_file()
    if not there:
        raise ConfigError(f"there is no saved model in {folder}: it has no config.json; check the path")
    values = _read_json(path)
    if {"method", "run_name"} <= values.keys():
        raise ConfigError(f"{folder} is the folder of a run, not of a model: name its model, {folder}/model")
    if values.get("model_type") != "gpt2":
        raise ConfigError(
            f"{path}: its model_type is {values.get('model_type')!r}; only models of type 'gpt2' can be "
            "trained"
        )
    if values.get("quantization_config") is not None:
        raise ConfigError(f"{path}: the model is quantized; name the folder of the model before that")
    try:
        config: GPT2Config = GPT2Config.from_dict(values)
        with torch.device("meta"):
            GPT2LMHeadModel(config)
    except (StrictDataclassError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}: no GPT-2 can be made of it: {_one_line(error)}") from error
    return config


def read_model(folder: Path, config: GPT2Config, dtype: torch.dtype) -> GPT2LMHeadModel:
    """Return the model with the folder's weights, in this dtype."""
    with file_errors(folder, ConfigError):
        path, weights = _read_weights(folder)
    if not any(name.startswith(PREFIX) for name in weights):  # as the published GPT-2 has them
        weights = {name if name == HEAD else PREFIX + name: tensor for name, tensor in weights.items()}
    with no_init_weights():  # which leaves out the tying, too
        model = GPT2LMHeadModel(config).to(dtype)
    model.tie_weights()
    weights = {name: tensor for name, tensor in weights.items() if not MASKS.fullmatch(name)}
    _check_weights(path, weights, model)
    model.load_state_dict(weights, strict=False)  # a tied head need not be in it
    return model.eval()


def _check_weights(path: Path, weights: dict[str, Tensor], model: GPT2LMHeadModel) -> None:
    want = model.state_dict()
    tied = bool(model.config.tie_word_embeddings)
    if missing := [name for name in want if name not in weights and not (tied and name == HEAD)]:
        raise ConfigError(f"{path}: the model's {_names(missing)} {_are(missing)} missing")
    if unknown := [name for name in weights if name not in want]:
        raise ConfigError(
            f"{path}: the model that config.json describes has no {_names(unknown)}: give the config.json "
            "that belongs to the weights"
        )
    for name, tensor in weights.items():
        if tensor.shape != want[name].shape:
            raise ConfigError(
                f"{path}: {name} has the shape {tuple(tensor.shape)}, config.json says "
                f"{tuple(want[name].shape)}: give the config.json that belongs to the weights"
            )
        if not tensor.is_floating_point():
            raise ConfigError(f"{path}: {name} is {tensor.dtype}: quantized weights cannot be trained")
        if not tensor.isfinite().all():
            raise ConfigError(f"{path}: {name} has values that are not finite")
    if tied and HEAD in weights and not (weights[HEAD] == weights[EMBEDDING]).all():
        raise ConfigError(
            f"{path}: {HEAD} is not {EMBEDDING}, and config.json says that they are one: set its "
            "tie_word_embeddings to false"
        )


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return the file that was read, or the index of several, and the weights by name."""
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return path, _read_shards(path) if name.endswith(".json") else _read_file(path)
    there = ", ".join(sorted(entry.name for entry in folder.iterdir()))
    raise ConfigError(
        f"{folder} has no weights: no model.safetensors and no pytorch_model.bin; it has {there}"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ConfigError(f"{index}: has no weight_map, which says in which file each weight is")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        path = index.with_name(Path(name).name)
        if not path.is_file():
            raise ConfigError(f"{index} names {name}, which is not there: copy it, too")
        weights |= _read_file(path)
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise ConfigError(
            f"{path} is a Git LFS pointer in the place of the weights: run `git lfs pull` in its folder"
        )
    if not start:
        raise ConfigError(f"{path} is empty: copy it again")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} is damaged, or no safetensors file: {_one_line(error)}; copy it again"
            ) from error
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (  # whatever an arbitrary file makes the restricted unpickler stumble over
        pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, LookupError, AttributeError,
        TypeError, AssertionError, struct.error,
    ) as error:  # fmt: skip
        raise ConfigError(
            f"{path} is damaged, or holds something else than tensors, which is never unpickled: copy it "
            "again, or save the model as safetensors"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(each, Tensor) for each in weights.values()):
        raise ConfigError(f"{path} is no state dict, a dict of tensors: save model.state_dict()")
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    with file_errors(path, ConfigError):
        content = path.read_bytes()
    try:
        values = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
