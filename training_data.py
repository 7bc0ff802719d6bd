"""The data of a run: which batches it trains on, evaluates on, and which rows its dot products refer to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from config_file import ConfigError, TrainingConfig, split_and_domain
from data_processing.tokenizers import Tokenizer, get_tokenizer
from dataloader import Batch, BatchLoader, BlockDataset, Prefetch, parse_domains, validation_batch
from distributed import World

EVALUATION_SEED = 1_000_003  # added to the run's seed: evaluation batches are not the first training batches


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
        """Opens the shards that the configuration names.

        Raises ShardError for shards that are missing or damaged, ConfigError for a domain that is not there,
        blocks longer than a shard, too few validation blocks, or shards of different tokenizers."""
        names, weights = (None, None) if config.domains is None else parse_domains(config.domains)
        blocks = {
            "train": open_blocks(config, config.train_set, names),
            "val": open_blocks(config, config.val_set, None),
            "test": open_blocks(config, config.test_set, None),
        }
        check_tokenizers(blocks)
        train = BatchLoader(
            blocks["train"],
            batch_size=config.batch_size,
            seed=config.seed,
            weights=weights,
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


def open_blocks(config: TrainingConfig, name: str, domains: tuple[str, ...] | None) -> BlockDataset:
    """The blocks of SPLIT or SPLIT:DOMAIN."""
    split, domain = split_and_domain(name)
    assert config.pile_data_dir is not None
    return BlockDataset.open(
        Path(config.pile_data_dir), split, config.block_size, (domain,) if domain else domains
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
