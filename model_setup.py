"""From a configuration to a model that can take a step: precision, weights, optimizer, DDP or FSDP2."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig

from config_file import TrainingConfig
from foundation.errors import ConfigError
from models.architectures import ARCHITECTURES, AUTO, BY_TYPE, architecture_config
from models.causal_lm import CausalLM, dropout_fields
from models.family import Family
from models.gpt2 import FrugalMLP
from models.pretrained import read_config, read_model
from run.checkpoint import find_saved_model
from run.processes import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """Where and in which dtypes a model trains."""

    device: torch.device
    model_dtype: torch.dtype  # of the parameters
    train_dtype: torch.dtype  # of the matrix products, by autocast where it differs

    @classmethod
    def of(cls, config: TrainingConfig) -> "Precision":
        """Return that of a resolved configuration."""
        return cls(
            torch.device(config.device),
            getattr(torch, config.model_dtype),
            getattr(torch, config.train_dtype),
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        if self.train_dtype == self.model_dtype:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.train_dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return the scaler of float16 losses; in other precisions it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.train_dtype == torch.float16)


def prepare_model(config: TrainingConfig, start: Path | None) -> CausalLM:
    """Return the model that a run begins with: that of the checkpoint it resumes from; the one that the named run
    saved (--eval_only); the one of --init_from; or a freshly initialised one.

    Raises:
        ConfigError: it cannot be read, or is not of the architecture that was asked for.
    """
    if start is not None:
        return load_model(start, config)
    if config.eval_only and config.saved_model is not None:
        return load_model(find_saved_model(config.saved_model), config)
    if config.init_from is not None:
        return load_model(Path(config.init_from), config, drop_dropout=True)
    return build_model(config)


def build_model(config: TrainingConfig) -> CausalLM:
    """Return a freshly initialised model on the device; the same seed gives the same weights with every method.

    Raises ConfigError for a block_size beyond the model's positions.
    """
    hf_config = architecture_config(config.architecture)
    check_positions(hf_config, config)
    torch.manual_seed(config.seed)
    return place(CausalLM(ARCHITECTURES[config.architecture].model(hf_config)), config)


def load_model(folder: Path, config: TrainingConfig, *, drop_dropout: bool = False) -> CausalLM:
    """Return the model in a folder in Hugging Face format, as a run saves it.

    Args:
        drop_dropout: set the dropout of its configuration to 0.

    Raises:
        ConfigError: it is missing or incomplete, of another size, has too few positions, or has dropout.
    """
    hf_config = read_config(folder)
    check_positions(hf_config, config)
    check_sizes(hf_config, config, folder)
    if drop_dropout:
        for holder, name, value in list(dropout_fields(hf_config)):
            logger.info("%s: %s=%s is set to 0", folder, name, value)
            setattr(holder, name, 0.0)
    model = CausalLM(read_model(folder, hf_config, getattr(torch, config.model_dtype)))
    if config.architecture == AUTO:
        logger.info("%s: %s", folder, in_words(model))
    return place(model, config)


def in_words(model: CausalLM) -> str:
    """Return what a model is, in one line."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = (
        "" if model.fused else "; its logits are not the output layer's alone, so they are computed in full"
    )
    return f"{type(model.hf).__name__} with {parameters:,} parameters and a vocabulary of {model.vocabulary} ids{head}"


def check_sizes(hf_config: PreTrainedConfig, config: TrainingConfig, folder: Path) -> None:
    """Raise ConfigError if a loaded model is not of the architecture that was asked for."""
    if config.architecture == AUTO:
        return
    family = ARCHITECTURES[config.architecture]
    want = {"model_type": family.model_type, **family.sizes[config.architecture]}
    for name, value, seen in compared(want, hf_config):
        if seen != value:
            raise ConfigError(
                f"--architecture {config.architecture} has {name} {value}, the model in {folder} {seen}: give the "
                f"architecture that it has, or --architecture {AUTO}, which reads it from there"
            )


def compared(want: Mapping[str, Any], hf_config: PreTrainedConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each size, also of those of configurations within it, as it should be and as it is."""
    for name, value in want.items():
        seen = getattr(hf_config, name, None)
        if isinstance(value, Mapping) and isinstance(seen, PreTrainedConfig):
            yield from compared(value, seen)
        else:
            yield name, value, seen


def check_positions(hf_config: PreTrainedConfig, config: TrainingConfig) -> None:
    """Raise ConfigError if a block has more positions than the model. A model whose configuration names no largest
    number of them has none."""
    text = hf_config.get_text_config()
    if hasattr(text, "max_position_embeddings") and config.block_size > text.max_position_embeddings:
        raise ConfigError(
            f"--block_size {config.block_size} is longer than the {text.max_position_embeddings} positions of "
            f"{config.architecture}"
        )


def place(model: CausalLM, config: TrainingConfig) -> CausalLM:
    """Move the model to its device and precision, and compile its blocks if so configured."""
    model.to(config.device, getattr(torch, config.model_dtype)).train()
    family = BY_TYPE.get(model.hf.config.model_type)
    if family is not None:
        freeze(model, family)
    train_only(model, family, config.train_only)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    set_up_blocks(model, compiled=config.compile, checkpointing=config.activation_checkpointing)
    return model


def freeze(model: nn.Module, family: Family) -> None:
    """Leave out of training what the model's family never trains."""
    for name, parameter in model.named_parameters():
        if not set(family.frozen).isdisjoint(name.split(".")):
            parameter.requires_grad_(False)


def train_only(model: CausalLM, family: Family | None, part: str) -> None:
    """Leave out of training all but one part of the model; "all" leaves out nothing.

    Raises ConfigError if the model has no such part.
    """
    if part == "all":
        return
    if family is None or part not in family.parts:
        raise ConfigError(f"--train_only {part}: {type(model.hf).__name__} has no such part; leave it out")
    for name, parameter in model.named_parameters():
        if family.parts[part] not in name.split("."):
            parameter.requires_grad_(False)


def set_up_blocks(model: CausalLM, *, compiled: bool, checkpointing: bool) -> None:
    """Set how the model's blocks run, and what they keep for the backward pass."""
    if checkpointing and not model.hf.supports_gradient_checkpointing:
        raise ConfigError(
            f"--activation_checkpointing: {type(model.hf).__name__} does not support it; leave it out"
        )
    if checkpointing:
        model.hf.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, FrugalMLP):
            module.frugal = not (compiled or checkpointing)
    # one graph serves all blocks; the head chooses its own parts
    for block in model.blocks() if compiled else ():
        block.compile()


def parallelise(model: CausalLM, config: TrainingConfig, world: World) -> nn.Module:
    """Return what the training loop calls in place of the model.

    With several processes that is its DDP wrapper, or the model with its parameters divided among them (FSDP2: one
    group for each block, one for embeddings, norm and head)."""
    if world.size == 1:
        return model
    if config.parallel == "fsdp":
        for block in model.blocks():
            fully_shard(block)
        fully_shard(model)
        return model
    gpus = [torch.cuda.current_device()] if config.device == "cuda" else None
    return DistributedDataParallel(model, device_ids=gpus, broadcast_buffers=False)


@contextmanager
def gradient_sync(parallel: nn.Module, wanted: bool) -> Iterator[None]:
    """Set whether the backward pass of a forward pass in this context reduces gradients over the processes.

    wanted: True for the last micro-batch of an optimizer step."""
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(wanted)
    with (
        parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not wanted else nullcontext()
    ):
        yield


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW or SGD, fused, with weight decay on matrices only (neither biases nor norms)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "SGD":
        return torch.optim.SGD(groups, lr=config.learning_rate, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
