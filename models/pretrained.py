"""A causal language model in a folder in Hugging Face format: config.json, and weights that are read without
unpickling.

Weights are safetensors, or what torch.load(weights_only=True) accepts, which makes tensors only. Every weight
of the model must be there, with the shape that config.json says, and every weight of the files must be the
model's; Hugging Face gives older files the names of today.
"""

import json
import logging
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from foundation.errors import ConfigError, file_errors
from models.architectures import AUTO, BY_TYPE, architecture_config

# In the order in which they are looked for, as transformers does.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SHOWN = 3  # names in a message


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return Hugging Face's class for causal models of this configuration. Raises KeyError if there is none."""
    if config.model_type in BY_TYPE:
        return BY_TYPE[config.model_type].model
    found: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(config)]
    return found


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a saved model. Raises ConfigError, naming the file and what is wrong in it."""
    path = folder / "config.json"
    with file_errors(path, ConfigError):
        there = path.is_file()
    if not there:
        raise ConfigError(f"there is no saved model in {folder}: it has no config.json; check the path")
    values = _read_json(path)
    if {"method", "run_name"} <= values.keys():
        raise ConfigError(f"{folder} is the folder of a run, not of a model: name its model, {folder}/model")
    kind = values.get("model_type")
    try:
        config_class = type(AutoConfig.for_model(kind))
        if kind not in BY_TYPE:
            AutoModelForCausalLM._model_mapping[config_class]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{path}: its model_type is {kind!r}, and transformers knows no causal language model of that type: "
            "name the folder of one that it knows"
        ) from error
    if values.get("quantization_config") is not None:
        raise ConfigError(f"{path}: the model is quantized; name the folder of the model before that")
    try:
        config: PreTrainedConfig = config_class.from_dict(values)
        with torch.device("meta"):
            model_class(config)(config)
    except (StrictDataclassError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"{path}: no model of type {kind} can be made of it: {_one_line(error)}") from error
    return config


def configuration(architecture: str, folder: Path | None) -> PreTrainedConfig:
    """Return the configuration of an architecture; of "auto", that of the model in the folder.

    Raises ConfigError as `read_config`.
    """
    if architecture != AUTO:
        return architecture_config(architecture)
    assert folder is not None, "checked with the flags"
    return read_config(folder)


def read_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model with the folder's weights, in this dtype."""
    with file_errors(folder, ConfigError):
        path, weights = _read_weights(folder)
    for name, tensor in weights.items():
        if not tensor.is_floating_point() and not _is_mask(name):
            raise ConfigError(f"{path}: {name} is {tensor.dtype}: quantized weights cannot be trained")
        if not tensor.isfinite().all() and not _is_mask(name):
            raise ConfigError(f"{path}: {name} has values that are not finite")
    with _quiet(), _refusals(path):
        model, found = model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in words of our own
        )
    _check_weights(path, model, found)
    trained: PreTrainedModel = model.eval()
    return trained


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Raise ConfigError for a model that transformers cannot make, as one without PyTorch's attention."""
    try:
        yield
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{path}: the model cannot be loaded: {_one_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Hugging Face from printing what is checked and said here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _is_mask(name: str) -> bool:
    """Return whether it is an attention mask, which older versions of transformers saved with the weights."""
    return name.endswith((".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"))


def _check_weights(path: Path, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise ConfigError unless the file's weights were the model's. found: what transformers reports of loading."""
    if missing := _in_order(model, found["missing_keys"]):
        raise ConfigError(f"{path}: the model's {_names(missing)} {_are(missing)} missing")
    if unknown := sorted(name for name in found["unexpected_keys"] if not _is_mask(name)):
        raise ConfigError(
            f"{path}: the model that config.json describes has no {_names(unknown)}: give the config.json "
            "that belongs to the weights"
        )
    for name, seen, want in sorted(found["mismatched_keys"]):
        raise ConfigError(
            f"{path}: {name} has the shape {tuple(seen)}, config.json says {tuple(want)}: give the config.json "
            "that belongs to the weights"
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head.weight is not embedding.weight:
        names = {id(module): name for name, module in model.named_modules()}
        raise ConfigError(
            f"{path}: {names[id(head)]}.weight is not {names[id(embedding)]}.weight, and config.json says that they "
            "are one: set its tie_word_embeddings to false"
        )


def _in_order(model: PreTrainedModel, names: set[str]) -> list[str]:
    return [name for name in model.state_dict() if name in names]


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
