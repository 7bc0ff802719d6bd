"""Trainers on a tiny model and the instructions of the examples, with and without scores."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from cases import tiny_gpt2
from torch import Tensor, nn
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from examples.instructions import instructions, tokenizer
from ghostEngines.integrations.transformers import scored

TOKENS = tokenizer()
TRAIN = instructions(22, seed=0).map(lambda row: TOKENS(row["prompt"] + row["completion"]))
VALIDATION = instructions(3, seed=1).map(lambda row: TOKENS(row["prompt"] + row["completion"]))
COLLATOR = DataCollatorForLanguageModeling(TOKENS, mlm=False)


def exact_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any) -> Tensor:
    """Hugging Face's loss without its rounding to float32."""
    y = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    total = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum")
    loss: Tensor = total / ((y != -100).sum() if num_items_in_batch is None else num_items_in_batch)
    return loss


def model(dtype: torch.dtype = torch.float64) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, whose loss is computed in its own precision."""
    torch.manual_seed(0)
    made = tiny_gpt2(tied=True, vocabulary=len(TOKENS)).to(dtype)
    made.loss_function = exact_loss
    return made


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder / "checkpoints"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "max_grad_norm": 0.5,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 4,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
        }
        | options
    )


def trainer(folder: Path, base: type[Trainer] = Trainer, *, plain: bool = False, **options: Any) -> Any:
    """A scored or a plain Trainer; options: of its arguments, or its own with a `with_`."""
    own = {
        "model": model(),
        "data_collator": COLLATOR,
        "train_dataset": TRAIN,
        "eval_dataset": VALIDATION,
        "processing_class": TOKENS,
    }
    if not plain:
        own |= {"score_against": VALIDATION, "scores": folder / "run", "sample_id": "number", "group": "kind"}
    own |= {name.removeprefix("with_"): options.pop(name) for name in list(options) if name.startswith("with_")}
    return (base if plain else scored(base))(args=arguments(folder, **options), **own)


class Killed(TrainerCallback):
    """Kills the process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, kill_after: int | None = None) -> int:
    """Train in a process of its own, which is killed after a step if one is given."""
    made = trainer(folder)
    if kill_after is not None:
        made.add_callback(Killed(kill_after))
    made.train()
    return 0
