"""Fine-tune a tiny Llama with TRL's SFTTrainer and LoRA, and know what each instruction did.

    PYTHONPATH=. python examples/trainer_sft.py results/sft       # a minute on a laptop, offline
    python -m attribution.curate results/sft --steps 25: --drop bottom:0.1 --output data/curated    # what stays

One instruction in ten has a wrong answer. At the end the report is written (results/sft/report.html), and the share of
wrong answers among the most harmful tenth of the instructions is printed. In the first epoch any sentence teaches the
form of all, so that values are of the later ones.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from attribution import values
from attribution.report import command as report
from attribution.values_folder import Values
from examples.instructions import instructions, tokenizer
from ghostEngines import Scoring
from ghostEngines.integrations.transformers import scored

ROWS, WRONG = 400, 0.1


def llama(vocabulary: int) -> LlamaForCausalLM:
    """Return a small model with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def main(folder: Path, rows: int = ROWS, epochs: float = 3) -> float:
    """Train, write values and report, and return the share of wrong answers among the most harmful tenth."""
    torch.manual_seed(0)
    words, train = tokenizer(), instructions(rows, seed=0, wrong=WRONG)
    trainer = scored(SFTTrainer)(
        model=llama(len(words)),
        args=SFTConfig(
            output_dir=str(folder.with_name(f"{folder.name}-checkpoints")),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_train_epochs=epochs,
            learning_rate=1e-2,
            gradient_checkpointing=False,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=10,
        ),
        train_dataset=train,
        processing_class=words,
        peft_config=LoraConfig(
            r=16,
            lora_dropout=0.0,
            target_modules="all-linear",
            modules_to_save=["embed_tokens", "lm_head"],  # random in this model, as no pretrained one's are
        ),
        score_against=instructions(16, seed=1),
        scores=folder,
        sample_id="number",
        group="kind",
        scoring=Scoring(every_exact=True, by_target=True),
    )
    trainer.train()
    for tool in (values, report):
        tool.main([str(folder), "--steps", f"{int(trainer.state.max_steps / epochs)}:"])
    of_samples = Values.open(folder / "values").read("samples").sort_by("value")
    worst = of_samples["sample_id"].to_numpy()[: rows // 10]
    share = float(np.mean([train[int(number)]["wrong"] for number in worst]))
    print(f"of the most harmful tenth of the instructions {share:.0%} are wrong; of all, {WRONG:.0%}")
    return share


if __name__ == "__main__":
    main(Path(sys.argv[1]))
