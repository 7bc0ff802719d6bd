"""Architectures, precision, optimizer: everything between a TrainingConfig and a model that can take a
step."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from config_file import TrainingConfig
from foundation.errors import ConfigError
from ghostEngines import CrossEntropyHead
from models.pretrained import read_config, read_model
from run.checkpoint import find_saved_model
from run.processes import World

logger = logging.getLogger(__name__)

# Sizes as published (Radford et al. 2019); GPT2-Tiny is for tests and quick looks.
ARCHITECTURES = {
    "GPT2-Tiny": {"n_layer": 2, "n_head": 4, "n_embd": 128},
    "GPT2-Small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "GPT2-Medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "GPT2-Large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
}
VOCABULARY = 50304  # 50257 rounded up to a multiple of 128, which makes the head's products faster
POSITIONS = 1024
DROPOUT_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


class FrugalMLP(nn.Module):
    """GPT-2's MLP under the same parameter names. Of the two widest tensors of a block, the activation
    function's input and its output, it keeps the first: the backward pass makes the second again, which costs
    little and spares a fifth of what a block keeps.

    frugal: False where something else decides on what is kept, checkpointing or a compiler."""

    def __init__(self, mlp: GPT2MLP) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = mlp.c_fc, mlp.act, mlp.c_proj
        self.frugal = True

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, T, d) -> (N, T, d)"""
        before = self.c_fc(hidden)
        after = self.act(before)
        if not (self.frugal and torch.is_grad_enabled()):
            return self.c_proj(after)
        storage = after.untyped_storage().data_ptr()

        def pack(kept: Tensor) -> Tensor | torch.Size:
            return kept.shape if kept.untyped_storage().data_ptr() == storage else kept

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            return kept if isinstance(kept, Tensor) else self.act(before.detach()).view(kept)

        with saved_tensors_hooks(pack, unpack):
            return self.c_proj(after)


class CausalLM(nn.Module):
    """A Hugging Face GPT-2 whose forward goes from tokens to losses: embedding, blocks, and the head fused
    with its loss.

    `hf` stays a GPT2LMHeadModel under its own parameter names, so that `hf.save_pretrained` writes what
    `GPT2LMHeadModel.from_pretrained` reads; only its `lm_head` is a CrossEntropyHead.
    """

    def __init__(self, hf: GPT2LMHeadModel) -> None:
        super().__init__()
        check_dropout(hf.config)
        self.checkpointing = False
        for block in hf.transformer.h:
            block.mlp = FrugalMLP(block.mlp)
        if hf.config._attn_implementation != "sdpa":
            raise ConfigError(
                f"the model's attention is {hf.config._attn_implementation}, which is not causal by itself: "
                "load it "
                'with attn_implementation="sdpa"'
            )
        head = CrossEntropyHead(hf.config.n_embd, hf.config.vocab_size)
        head.weight = hf.lm_head.weight  # the embedding's own weight where the two are tied
        hf.lm_head = head
        self.hf = hf

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (N, T) token ids, y (N, T) the ids that follow them, -100 for none -> losses (N,) in nats per
        token.

        Hugging Face's own forward would look at the position ids for packed sequences, which waits for the
        device in every step; without a mask its blocks attend causally.
        """
        gpt = self.hf.transformer
        positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        hidden = gpt.wte(x) + gpt.wpe(positions)  # (N, T, d)
        for block in gpt.h:
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        return self.hf.lm_head(gpt.ln_f(hidden), y)


def check_dropout(config: GPT2Config) -> None:
    """ConfigError for a configuration with dropout: validation rows would change the masks of the train rows,
    and the scores would be of a random model."""
    for name in DROPOUT_FIELDS:
        if getattr(config, name) != 0:
            raise ConfigError(f"the model's configuration has {name}={getattr(config, name)}: set it to 0.0")


def architecture_config(architecture: str) -> GPT2Config:
    """The Hugging Face configuration of one of ARCHITECTURES."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        # GPT-2's own activation, gelu_new, is this function written out in five operations
        activation_function="gelu_pytorch_tanh",
        **dict.fromkeys(DROPOUT_FIELDS, 0.0),
        **ARCHITECTURES[architecture],
    )


@dataclass(frozen=True)
class Precision:
    """model_dtype: of the parameters. train_dtype: of the matrix products, by autocast where it differs."""

    device: torch.device
    model_dtype: torch.dtype
    train_dtype: torch.dtype

    @classmethod
    def of(cls, config: TrainingConfig) -> "Precision":
        return cls(
            torch.device(config.device),
            getattr(torch, config.model_dtype),
            getattr(torch, config.train_dtype),
        )

    def autocast(self) -> AbstractContextManager:
        """The context of the forward pass."""
        if self.train_dtype == self.model_dtype:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.train_dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss where float16 would lose small gradients; does nothing in every other precision."""
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
    """A freshly initialised model on the device, the same for the same seed whatever the method.

    Raises ConfigError for a block_size beyond the model's positions.
    """
    hf_config = architecture_config(config.architecture)
    check_positions(hf_config, config)
    torch.manual_seed(config.seed)
    return place(CausalLM(GPT2LMHeadModel(hf_config)), config)


def load_model(folder: Path, config: TrainingConfig, *, drop_dropout: bool = False) -> CausalLM:
    """The model in a folder in Hugging Face format, as a run saves it. Raises ConfigError if it is not there
    or not whole, has too few positions, or has dropout, which `drop_dropout` sets to 0."""
    hf_config = read_config(folder)
    check_positions(hf_config, config)
    check_sizes(hf_config, config)
    if drop_dropout:
        for name in DROPOUT_FIELDS:
            if getattr(hf_config, name) != 0:
                logger.info("%s: %s=%s is set to 0", folder, name, getattr(hf_config, name))
                setattr(hf_config, name, 0.0)
    return place(CausalLM(read_model(folder, hf_config, getattr(torch, config.model_dtype))), config)


def check_sizes(hf_config: GPT2Config, config: TrainingConfig) -> None:
    """ConfigError if a loaded model is not of the architecture that was asked for."""
    for name, want in ARCHITECTURES[config.architecture].items():
        if getattr(hf_config, name) != want:
            raise ConfigError(
                f"--architecture {config.architecture} has {name} {want}, the model in the folder "
                f"{getattr(hf_config, name)}: give the architecture that it has"
            )


def check_positions(hf_config: GPT2Config, config: TrainingConfig) -> None:
    """ConfigError if a block has more positions than the model."""
    if config.block_size > hf_config.n_positions:
        raise ConfigError(
            f"--block_size {config.block_size} is longer than the {hf_config.n_positions} positions of "
            f"{config.architecture}"
        )


def place(model: CausalLM, config: TrainingConfig) -> CausalLM:
    """The model on its device, in its precision, with its blocks compiled if so configured."""
    model.to(config.device, getattr(torch, config.model_dtype)).train()
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    set_up_blocks(model, compiled=config.compile, checkpointing=config.activation_checkpointing)
    return model


def set_up_blocks(model: CausalLM, *, compiled: bool, checkpointing: bool) -> None:
    """How the model's blocks run, and what they keep for the backward pass."""
    model.checkpointing = checkpointing
    for block in model.hf.transformer.h:
        block.mlp.frugal = not (compiled or checkpointing)
        if compiled:  # one graph serves all blocks; the head chooses its own parts
            block.compile()


def parallelise(model: CausalLM, config: TrainingConfig, world: World) -> nn.Module:
    """What the training loop calls in place of the model: with several processes its DDP wrapper, or itself
    with its parameters divided among them (FSDP2: each block a group, embeddings, norm and head another)."""
    if world.size == 1:
        return model
    if config.parallel == "fsdp":
        for block in model.hf.transformer.h:
            fully_shard(block)
        return fully_shard(model)
    gpus = [torch.cuda.current_device()] if config.device == "cuda" else None
    return DistributedDataParallel(model, device_ids=gpus, broadcast_buffers=False)


@contextmanager
def gradient_sync(parallel: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether the backward pass of a forward pass made in here reduces the gradients over the processes: once
    for each optimizer step, with its last micro-batch."""
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(wanted)
    with (
        parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not wanted else nullcontext()
    ):
        yield


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW or SGD, fused, with weight decay on matrices only (neither biases nor norms)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "SGD":
        return torch.optim.SGD(groups, lr=config.learning_rate, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
