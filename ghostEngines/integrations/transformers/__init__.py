"""Hugging Face's Trainer, and what derives from it, with a score for each training sample.

from ghostEngines.integrations.transformers import scored

trainer = scored(SFTTrainer)(model=..., args=..., train_dataset=..., score_against=validation, scores="results/sft")
trainer.train()
"""

from foundation.optional import optional

for package in ("transformers", "accelerate"):
    optional(package, extra="transformers")

from .trainer import scored  # noqa: E402  (after the error that names what is missing)

__all__ = ["scored"]
