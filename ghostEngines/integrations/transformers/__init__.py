"""Hugging Face's Trainer, and what derives from it, with a score for each training sample.

from ghostEngines.integrations.transformers import scored

trainer = scored(SFTTrainer)(model=..., args=..., train_dataset=..., score_against=validation, scores="results/sft")
trainer.train()
"""

from .trainer import scored

__all__ = ["scored"]
