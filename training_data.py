"""The data of a run: which batches it trains on, evaluates on, and which rows its dot products refer to."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from config_file import ConfigError, TrainingConfig
from data_processing.tokenizers import Tokenizer, get_tokenizer
from dataloader import Batch, BatchLoader, BlockDataset, Prefetch, validation_batch
from distributed import World
from domain_lists import Selection, shown

EVALUATION_SEED = 1_000_003  # added to the run's seed: evaluation batches are not the first training batches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """train: the loader of training batches. evaluation: a loader for each of train, val and test.
    validation: the rows (m, T) that dot products refer to. tokenizer: the one that made the shards."""

    train: Prefetch
    evaluation: dict[str, BatchLoader]
    validation: Batch
    tokenizer: Tokenizer
    blocks: dict[str, BlockDataset]

    @classmethod
    def open(cls, config: TrainingConfig, world: World) -> "TrainingData":
        """Opens the shards that the configuration names, and logs which domains have no whole block.

        Raises ShardError for shards that are missing or damaged, ConfigError for a domain that was named and
        is not there or has no whole block, a split without a whole block, too few validation blocks, or
        shards of different tokenizers."""
        assert config.pile_data_dir is not None
        data_dir, selections = Path(config.pile_data_dir), config.selections()
        blocks = {
            name: BlockDataset.open(data_dir, config.block_size, selection)
            for name, selection in selections.items()
        }
        check_tokenizers(blocks)
        log_short_domains(selections, blocks, config.block_size)
        train = BatchLoader(
            blocks["train"],
            batch_size=config.batch_size,
            seed=config.seed,
            weights=selections["train"].weights,
            rank=world.rank,
            world_size=world.size,
            micro_batches=config.gradient_accumulation_steps,
        )
        assert config.eval_bs is not None
        evaluation = {
            name: BatchLoader(part, batch_size=config.eval_bs, seed=config.seed + EVALUATION_SEED)
            for name, part in blocks.items()
        }
        validation = validation_batch(blocks["val"], config.val_batch_size, config.seed)
        ahead = Prefetch(train, pin=config.device == "cuda")
        return cls(ahead, evaluation, validation, get_tokenizer(blocks["train"].tokenizer), blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.train.close()


def log_short_domains(
    selections: Mapping[str, Selection], blocks: Mapping[str, BlockDataset], block_size: int
) -> None:
    """Log one line that names the domains without a whole block, if there are any."""
    found = [
        f"{shown(domain)} in {selections[name].split} ({tokens} tokens)"
        for name, part in blocks.items()
        for domain, tokens in part.short.items()
    ]
    if found:
        logger.warning(
            "domains without a whole block of %d tokens (--block_size %d and the last target) are not used: "
            "%s",
            block_size + 1,
            block_size,
            ", ".join(dict.fromkeys(found)),
        )


def check_tokenizers(blocks: dict[str, BlockDataset]) -> None:
    """ConfigError for splits of different tokenizers."""
    tokenizers = {name: part.tokenizer for name, part in blocks.items()}
    if len(set(tokenizers.values())) > 1:
        raise ConfigError(f"the splits were made by different tokenizers, {tokenizers}: make them with one")


def check_tokens(blocks: dict[str, BlockDataset], vocabulary: int) -> None:
    """ConfigError for token ids that the model has no row for."""
    for name, part in blocks.items():
        if part.max_token_id >= vocabulary:
            raise ConfigError(
                f"the {name} shards have token id {part.max_token_id}, the model's vocabulary ends at "
                f"{vocabulary - 1}: tokenize them with a GPT-2 tokenizer"
            )
