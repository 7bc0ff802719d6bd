"""The data of a run: training and evaluation batches in a seeded order, and the validation rows.

Row r of global step s is position s*B + r of the order, with B the rows of all processes together: how many
processes share them does not matter, and a step is found without walking through those before it. Nothing here
is as large as the data.
"""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias

from config_file import TrainingConfig
from data_processing.block_order import BatchOrder, seeded_choice
from data_processing.blocks import Batch, BlockDataset
from data_processing.domain_lists import Selection, shown
from data_processing.tokenizer_files import open_tokenizer, same_tokenizer, tokenizer_of
from data_processing.tokenizers import Tokenizer
from foundation.errors import ConfigError
from llava_dataloader import LlavaDataset
from models.architectures import BY_TYPE
from models.pretrained import configuration
from run.processes import World
from score_store.samples import IMAGES, Sample
from score_store.validation_rows import Shown, tokens_of

EVALUATION_SEED = 1_000_003  # added to the run's seed: evaluation batches are not the first training batches

logger = logging.getLogger(__name__)

Dataset: TypeAlias = BlockDataset | LlavaDataset


class BatchLoader:
    """This process's rows of each global step, steps in any order: to resume, the step's number is enough.

    batch_size: rows of one micro-batch of one process; micro_batches: of each process in each step. weights:
    None, or of every domain of the dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        weights: dict[str, float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"--batch_size {batch_size}: at least 1")
        assert 0 <= rank < world_size, (rank, world_size)
        self._dataset = dataset
        self._order = BatchOrder(dataset.blocks_per_domain, seed, weights)
        self._batch_size = batch_size
        self._rank, self._world_size, self.micro_batches = rank, world_size, micro_batches

    def batch(self, step: int, micro_batch: int = 0) -> Batch:
        """Return this process's rows of global step `step`.

        They begin at row (rank·G + micro_batch)·b of the step, with G micro-batches of b rows; all are counted from 0.
        """
        assert 0 <= micro_batch < self.micro_batches, micro_batch
        process = step * self._world_size + self._rank
        start = (process * self.micro_batches + micro_batch) * self._batch_size
        return self._dataset.batch(self._order.places(start, self._batch_size))


class Prefetch:
    """A loader's batches, of which the next one is read while the present one is at work.

    pin: in memory from which a GPU copies while the program runs. An error in reading a batch is raised
    when that batch is asked for.
    """

    def __init__(self, loader: BatchLoader, *, pin: bool) -> None:
        self._loader, self._pin = loader, pin
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._coming: tuple[tuple[int, int], Future[Batch]] | None = None

    def batch(self, step: int, micro_batch: int = 0) -> Batch:
        """Return a batch as `BatchLoader` does, in any order; only the one after the last is read ahead."""
        place = step, micro_batch
        if self._coming is None or self._coming[0] != place:
            self._coming = place, self._reader.submit(self._read, *place)
        batch = self._coming[1].result()
        last = micro_batch + 1 == self._loader.micro_batches
        place = (step + 1, 0) if last else (step, micro_batch + 1)
        self._coming = place, self._reader.submit(self._read, *place)
        return batch

    def _read(self, step: int, micro_batch: int) -> Batch:
        batch = self._loader.batch(step, micro_batch)
        return batch.pinned() if self._pin else batch

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(cancel_futures=True)


def validation_batch(dataset: Dataset, m: int, seed: int) -> Batch:
    """Return m distinct blocks, all equally likely, chosen by the seed alone.

    Raises ConfigError if there are fewer.
    """
    if not 1 <= m <= dataset.num_blocks:
        raise ConfigError(
            f"--val_batch_size {m}: there are {dataset.num_blocks} validation blocks of {dataset.block_size} "
            f"positions; choose 1 to {dataset.num_blocks}, or a smaller --block_size"
        )
    return dataset.batch(seeded_choice(m, dataset.blocks_per_domain, seed))


@dataclass(frozen=True)
class TrainingData:
    """train: the loader of training batches. evaluation: a loader for each of train, val and test.
    validation: the rows (m, T) that dot products refer to. tokenizer: the one that made the shards."""

    train: Prefetch
    evaluation: dict[str, BatchLoader]
    validation: Batch
    tokenizer: Tokenizer
    blocks: dict[str, Dataset]

    @classmethod
    def open(cls, config: TrainingConfig, world: World) -> "TrainingData":
        """Open the shards that the configuration names, and log which domains have no complete block.

        Raises:
            ShardError: shards are missing or damaged.
            ConfigError: a domain that was named does not exist or has no complete block, a split has none,
                there are too few validation blocks, or the shards are of different tokenizers.
        """
        selections = config.selections()
        blocks, tokenizer = open_datasets(config, selections)
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
        return cls(ahead, evaluation, validation, tokenizer, blocks)

    def shown(self, rows: Batch) -> list[Shown]:
        """Return what is shown of validation rows."""
        blocks = self.blocks["val"]
        if isinstance(blocks, LlavaDataset):
            return [blocks.shown(number) for number in rows.blocks.tolist()]
        return [Shown(self.tokenizer.decode(row)) for row in tokens_of(rows).tolist()]

    def kept_samples(self) -> Iterator[Sample] | None:
        """Return the training samples that the run keeps in its folder; None if they are blocks of shards."""
        train = self.blocks["train"]
        return train.samples() if isinstance(train, LlavaDataset) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.train.close()


def open_datasets(
    config: TrainingConfig, selections: Mapping[str, Selection]
) -> tuple[dict[str, Dataset], Tokenizer]:
    """Return the samples of each selection, and the tokenizer of their texts: LLaVA records for a model that takes
    images, else the blocks of shards.

    Raises as `TrainingData.open`, and as LlavaDataset.
    """
    model = configuration(config.architecture, config.model_folder)
    if model.model_type in BY_TYPE and BY_TYPE[model.model_type].images:
        assert config.llava_data_dir is not None
        folder, tokenizer = Path(config.llava_data_dir), open_tokenizer(config.tokenizer)
        return {
            name: LlavaDataset(
                folder / f"{selection.split}.json",
                folder / IMAGES,
                selection,
                model=model,
                model_folder=config.model_folder,
                tokenizer=tokenizer,
                block_size=config.block_size,
                on_bad_record=config.on_bad_record,
            )
            for name, selection in selections.items()
        }, tokenizer
    assert config.pile_data_dir is not None
    data_dir = Path(config.pile_data_dir)
    blocks: dict[str, Dataset] = {
        name: BlockDataset.open(data_dir, config.block_size, selection)
        for name, selection in selections.items()
    }
    return blocks, tokenizer_of(blocks["train"].ids, data_dir)


def log_short_domains(
    selections: Mapping[str, Selection], blocks: Mapping[str, Dataset], block_size: int
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


def check_tokenizers(blocks: Mapping[str, Dataset]) -> None:
    """Raise ConfigError for splits of different tokenizers."""
    tokenizers = {name: part.ids.tokenizer for name, part in blocks.items()}
    if len({part.ids for part in blocks.values()}) > 1:
        raise ConfigError(f"the splits were made by different tokenizers, {tokenizers}: make them with one")


def check_tokens(blocks: Mapping[str, Dataset], vocabulary: int, folder: Path | None) -> None:
    """Raise ConfigError for token ids that the model has no row for, and for tokens of another tokenizer than the one
    in the model's folder.

    Args:
        vocabulary: how many ids the model knows.
        folder: where the model comes from; None for a new one.
    """
    for name, part in blocks.items():
        if part.max_token_id >= vocabulary:
            raise ConfigError(
                f"the {name} shards have token id {part.max_token_id}, the model's vocabulary ends at "
                f"{vocabulary - 1}: tokenize them with the model's own tokenizer, or for an untrained model with one "
                "of fewer ids (data/demo_bpe has 4096)"
            )
    ids = blocks["train"].ids
    same = None if folder is None else same_tokenizer(folder, ids)
    if folder is not None and same is None:
        logger.info("%s has no tokenizer.json, so whether it made the shards is not checked", folder)
    if same is False:
        raise ConfigError(
            f"the shards were made by {ids.tokenizer}, and the model in {folder} has another tokenizer: tokenize "
            f"the text with --tokenizer {folder}"
        )
