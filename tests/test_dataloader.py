"""Blocks, their ids and their order: permanent, seeded, complete, the same for any number of processes."""

import shlex
import threading
import time
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import start

from attribution.scored_run import ScoredRun
from attribution.values import print_values, write_values
from config_file import TrainingConfig, resolve
from data_processing import block_order as batch_order
from data_processing.block_order import BatchOrder, WeightedDraws, permute
from data_processing.blocks import Batch, BlockDataset
from data_processing.domain_lists import Selection, listed, parse_domains, parse_set, quoted
from data_processing.shard_files import ShardError
from data_processing.shards import GPT2_BYTES_IDS, GPT2_IDS, ShardWriter, open_shard
from dataloader import BatchLoader, Prefetch, TrainingData, validation_batch
from foundation.errors import ConfigError
from run.processes import World

BLOCK_SIZE = 8
BLOCKS = {"ArXiv": 12, "Pile-CC": 5, "Wikipedia (en)": 30}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document a domain, of tokens that tell domain and position."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    for number, (domain, blocks) in enumerate(BLOCKS.items()):
        with ShardWriter(folder / "train", domain, split="train", ids=GPT2_BYTES_IDS) as shard:
            shard.append(
                1000 * number + np.arange(blocks * BLOCK_SIZE + 3)
            )  # 3 and END_OF_TEXT are left over
    return folder


def train_blocks(data_dir: Path, block_size: int, domains: str | None = None) -> BlockDataset:
    selection = parse_set("--train_set", "train") if domains is None else parse_domains(domains, "train")
    return BlockDataset.open(data_dir, block_size, selection)


@pytest.fixture
def dataset(data_dir: Path) -> BlockDataset:
    return train_blocks(data_dir, BLOCK_SIZE)


def places(batch: Batch) -> list[tuple[str, int]]:
    return list(zip(batch.domains, batch.blocks.tolist(), strict=True))


# Blocks


def test_a_dataset_knows_its_shards(data_dir: Path, dataset: BlockDataset) -> None:
    assert dataset.domains == tuple(BLOCKS)
    assert dataset.blocks_per_domain == BLOCKS
    assert dataset.num_blocks == sum(BLOCKS.values())
    assert dataset.tokenizer == "gpt2_bytes"
    assert dataset.max_token_id == GPT2_IDS.end_of_text
    assert dataset.block_size == BLOCK_SIZE
    assert dataset.checksums == {
        domain: open_shard(data_dir / "train" / f"{domain}.json").checksum for domain in BLOCKS
    }


def test_blocks_are_views_that_share_one_token(dataset: BlockDataset) -> None:
    for domain, number in (("ArXiv", 0), ("Wikipedia (en)", 2)):
        for block in range(BLOCKS[domain]):
            tokens = dataset.tokens(domain, block)
            start = 1000 * number + block * BLOCK_SIZE
            assert tokens.tolist() == list(range(start, start + BLOCK_SIZE + 1))
            assert tokens.dtype == np.uint16
            assert not tokens.flags.owndata
            assert not tokens.flags.writeable
    for block in (-1, BLOCKS["ArXiv"]):
        with pytest.raises(IndexError, match=f"block {block} of 'ArXiv', which has 12"):
            dataset.tokens("ArXiv", block)


def test_a_shard_that_is_just_long_enough(tmp_path: Path) -> None:
    for tokens, blocks in ((BLOCK_SIZE, 1), (2 * BLOCK_SIZE - 1, 1), (2 * BLOCK_SIZE, 2)):
        with ShardWriter(tmp_path, f"{tokens}", split=tmp_path.name, ids=GPT2_IDS) as shard:
            shard.append(range(tokens))  # and END_OF_TEXT
        selection = parse_set("--train_set", f"{tmp_path.name}:{tokens}")
        dataset = BlockDataset.open(tmp_path.parent, BLOCK_SIZE, selection)
        assert dataset.num_blocks == blocks
        assert len(dataset.tokens(f"{tokens}", blocks - 1)) == BLOCK_SIZE + 1


def test_targets_are_shifted_once(dataset: BlockDataset) -> None:
    batch = dataset.batch([("Pile-CC", 3), ("ArXiv", 0)])
    assert batch.x.dtype == batch.y.dtype == torch.int64
    assert batch.x.shape == batch.y.shape == (2, BLOCK_SIZE)
    assert batch.x.is_contiguous()
    assert batch.y.is_contiguous()
    assert batch.x[0].tolist() == list(range(1024, 1032))
    assert batch.y[0].tolist() == list(range(1025, 1033))
    assert torch.equal(batch.y[:, :-1], batch.x[:, 1:])
    assert places(batch) == [("Pile-CC", 3), ("ArXiv", 0)]
    assert batch.sample_ids.dtype == batch.blocks.dtype == np.int64


def test_sample_ids_do_not_depend_on_the_domains_in_use(data_dir: Path, dataset: BlockDataset) -> None:
    some = train_blocks(data_dir, BLOCK_SIZE, "Wikipedia (en),Pile-CC")
    assert some.domains == ("Pile-CC", "Wikipedia (en)")
    for domain in some.domains:
        for block in range(BLOCKS[domain]):
            assert some.sample_id(domain, block) == dataset.sample_id(domain, block)
    ids = [dataset.sample_id(domain, block) for domain, blocks in BLOCKS.items() for block in range(blocks)]
    assert len(set(ids)) == len(ids)
    assert dataset.sample_id("Wikipedia (en)", 29) == 2 * 2**40 + 29
    assert some.batch([("Pile-CC", 4)]).sample_ids.tolist() == [2**40 + 4]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (parse_domains("arxiv,ArXiv,Enron", "train"), "--domains 'arxiv,ArXiv,Enron': no arxiv, Enron in "),
        (parse_set("--train_set", "train:Enron"), "--train_set 'train:Enron': no Enron in "),
        (parse_set("--val_set", 'train:ArXiv,"a, b"'), '--val_set \'train:ArXiv,"a, b"\': no "a, b" in '),
        (parse_set("--test_set", "train:Arxiv"), "--test_set 'train:Arxiv': no Arxiv in "),
    ],
)
def test_domains_that_are_not_there(data_dir: Path, selection: Selection, message: str) -> None:
    with pytest.raises(ConfigError, match=r"choose from ArXiv, Pile-CC, Wikipedia \(en\)$") as error:
        BlockDataset.open(data_dir, BLOCK_SIZE, selection)
    assert str(error.value).startswith(message)


def test_a_split_that_is_not_there(data_dir: Path) -> None:
    with pytest.raises(ShardError, match="no shards of split 'val'"):
        BlockDataset.open(data_dir, BLOCK_SIZE, parse_set("--val_set", "val"))
    with pytest.raises(ConfigError, match="--block_size 0"):
        train_blocks(data_dir, 0)


def test_a_domain_without_a_whole_block_has_no_samples(data_dir: Path, dataset: BlockDataset) -> None:
    """The others keep their sample ids."""
    longer = train_blocks(data_dir, 60)
    assert longer.domains == ("ArXiv", "Wikipedia (en)")
    assert longer.blocks_per_domain == {"ArXiv": 1, "Wikipedia (en)": 4}
    assert longer.short == {"Pile-CC": 44}
    assert list(longer.checksums) == ["ArXiv", "Wikipedia (en)"]
    assert longer.all_domains == dataset.all_domains == list(BLOCKS)
    assert longer.sample_id("Wikipedia (en)", 3) == 2 * 2**40 + 3
    assert dataset.short == {}
    seen = {
        place for step in range(5) for place in places(BatchLoader(longer, batch_size=1, seed=0).batch(step))
    }
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("selection", "remedy"),
    [
        (parse_domains("Pile-CC,ArXiv", "train"), "--domains ArXiv"),
        (
            parse_domains("Wikipedia (en):2,Pile-CC:1,ArXiv:0.5", "train"),
            "--domains 'Wikipedia (en):2,ArXiv:0.5'",
        ),
        (parse_set("--val_set", "train:Pile-CC,Wikipedia (en)"), "--val_set 'train:Wikipedia (en)'"),
    ],
)
def test_a_domain_that_was_named_must_have_a_block(data_dir: Path, selection: Selection, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        BlockDataset.open(data_dir, 60, selection)
    assert str(error.value) == (
        f"{selection.flag} {selection.value!r}: a block is 61 tokens, and in {data_dir / 'train'} there are "
        f"fewer in Pile-CC (44 tokens); choose {remedy}, or --block_size 43 or smaller"
    )


@pytest.mark.parametrize("value", ["train", "train:ArXiv,Wikipedia (en)"])
def test_a_split_without_a_whole_block_is_an_error(data_dir: Path, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        BlockDataset.open(data_dir, 1000, parse_set("--test_set", value))
    BlockDataset.open(data_dir, 243, parse_set("--test_set", "train:Wikipedia (en)"))
    assert str(error.value) == (
        f"--test_set {value!r}: a block is 1001 tokens, and the longest of these domains in "
        f"{data_dir / 'train'} is Wikipedia (en) (244 tokens); choose --block_size 243 or smaller"
    )


def test_a_token_beyond_the_vocabulary_is_found_when_it_is_read(tmp_path: Path) -> None:
    """Opening does not read the tokens; a damaged file must not reach the embedding."""
    with ShardWriter(tmp_path, "A", split=tmp_path.name, ids=GPT2_IDS) as shard:
        shard.append(range(40))
    data = np.fromfile(tmp_path / "A.bin", "<u2")
    data[19] = 50257
    data.tofile(tmp_path / "A.bin")
    dataset = BlockDataset.open(tmp_path.parent, BLOCK_SIZE, parse_set("--train_set", tmp_path.name))
    dataset.batch([("A", 0), ("A", 1)])
    with pytest.raises(ShardError, match=r"A\.bin: token id 50257 in block 2 is beyond"):
        dataset.batch([("A", 0), ("A", 2), ("A", 1)])


# The order


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 4096, 4097])
def test_permutations_are_permutations(size: int) -> None:
    for seed in range(20):
        permuted = permute(np.arange(size), size, batch_order._keys(seed))
        assert sorted(permuted.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [3, 5, 16, 47])
def test_permutations_are_even(size: int) -> None:
    """Over the keys each index goes everywhere equally often (chi-square over size^2 cells, 6 sigma)."""
    rounds = 2000
    table = np.zeros((size, size))
    for seed in range(rounds):
        table[np.arange(size), permute(np.arange(size), size, batch_order._keys("even", seed))] += 1
    expected = rounds / size
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)


def test_neighbours_in_the_order_are_unrelated() -> None:
    """The step between neighbours is as that of independent draws: a third of the range on average."""
    permuted = permute(np.arange(100_000), 10**9, batch_order._keys("steps"))
    assert abs(np.abs(np.diff(permuted)).mean() / 10**9 - 1 / 3) < 0.005
    assert abs(np.corrcoef(permuted[:-1], permuted[1:])[0, 1]) < 0.02
    for bit in range(29):
        assert abs((permuted >> bit & 1)[permuted < 2**29].mean() - 0.5) < 0.02


def test_each_epoch_visits_each_block_once(dataset: BlockDataset) -> None:
    order = BatchOrder(dataset.blocks_per_domain, seed=1)
    everything = {(domain, block) for domain, blocks in BLOCKS.items() for block in range(blocks)}
    epochs = [order.places(epoch * dataset.num_blocks, dataset.num_blocks) for epoch in range(4)]
    for epoch in epochs:
        assert set(epoch) == everything
        assert len(epoch) == len(everything)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert BatchOrder(dataset.blocks_per_domain, seed=1).places(0, 47) == epochs[0]
    assert BatchOrder(dataset.blocks_per_domain, seed=2).places(0, 47) != epochs[0]


WEIGHTS = [None, {"ArXiv": 2.0, "Pile-CC": 1.0, "Wikipedia (en)": 0.5}]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 4), (2, 2), (4, 1)])
def test_the_order_does_not_depend_on_the_number_of_processes(
    dataset: BlockDataset, weights: dict | None, batch_size: int, world_size: int
) -> None:
    expected = BatchOrder(dataset.blocks_per_domain, 3, weights).places(0, 4 * 50)
    loaders = [
        BatchLoader(dataset, batch_size=batch_size, seed=3, weights=weights, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = [place for step in range(50) for loader in loaders for place in places(loader.batch(step))]
    assert seen == expected


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_step_is_found_without_those_before_it(dataset: BlockDataset, weights: dict | None) -> None:
    options: dict[str, Any] = {"batch_size": 3, "seed": 5, "weights": weights, "rank": 1, "world_size": 2}
    loader = BatchLoader(dataset, **options)
    in_order = [loader.batch(step) for step in range(60)]
    for loader_again in (loader, BatchLoader(dataset, **options)):
        for step in (59, 0, 17, 18, 5, 59):
            batch = loader_again.batch(step)
            assert places(batch) == places(in_order[step])
            assert torch.equal(batch.x, in_order[step].x)
            assert batch.sample_ids.tolist() == in_order[step].sample_ids.tolist()


def test_the_next_batch_is_read_ahead(dataset: BlockDataset) -> None:
    """The same batches in any order; after each the one that follows is being read already, in another
    thread; an error comes with its own batch."""
    loader = BatchLoader(dataset, batch_size=3, seed=1)
    read: list[tuple[int, bool]] = []
    event = threading.Event()

    class Watched(BatchLoader):
        def batch(self, step: int, micro_batch: int = 0) -> Batch:
            if step == 6:
                raise ShardError("broken")
            read.append((step, threading.current_thread() is threading.main_thread()))
            event.set()
            return super().batch(step, micro_batch)

    ahead = Prefetch(Watched(dataset, batch_size=3, seed=1), pin=False)
    for step in (0, 1, 4, 5):
        assert places(ahead.batch(step)) == places(loader.batch(step))
    event.clear()
    assert places(ahead.batch(2)) == places(loader.batch(2))
    event.wait(10)
    with pytest.raises(ShardError, match="broken"):
        ahead.batch(6)
    ahead.close()
    steps = [step for step, _ in read]
    assert steps[:7] == [0, 1, 2, 4, 5, 2, 3] and not any(in_main for _, in_main in read)


def test_weights_are_frequencies_and_each_domain_keeps_its_epochs(dataset: BlockDataset) -> None:
    weights = {"ArXiv": 2.0, "Pile-CC": 1.0, "Wikipedia (en)": 5.0}
    order = BatchOrder(dataset.blocks_per_domain, 7, weights)
    count = 40_000
    drawn = order.places(0, count)
    frequencies = Counter(domain for domain, _ in drawn)
    for domain, weight in weights.items():
        share = weight / 8
        assert abs(frequencies[domain] - count * share) < 5 * np.sqrt(count * share * (1 - share))
        blocks = [block for name, block in drawn if name == domain]
        epochs = [
            tuple(blocks[start : start + BLOCKS[domain]]) for start in range(0, len(blocks), BLOCKS[domain])
        ]
        assert all(set(epoch) == set(range(BLOCKS[domain])) for epoch in epochs[:-1])
        assert len(set(epochs)) > 0.95 * min(len(epochs), 120)
    runs = sum(first[0] == second[0] for first, second in pairwise(drawn)) / count
    assert abs(runs - sum((weight / 8) ** 2 for weight in weights.values())) < 0.02  # draws are independent


def test_a_domains_own_order_depends_on_no_other_domain() -> None:
    def order_of(domain: str, weights: dict[str, float]) -> list[int]:
        drawn = BatchOrder(dict.fromkeys(weights, 50), 7, weights).places(0, 1000)
        return [block for name, block in drawn if name == domain][:100]

    among_three = order_of("c", {"a": 1.0, "b": 1.0, "c": 1.0})
    assert order_of("c", {"b": 1.0, "c": 3.0}) == among_three
    assert order_of("b", {"b": 1.0, "c": 3.0}) != among_three


def test_draws_are_counted_again_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_order, "COUNT_CHUNK", 64)
    draws = WeightedDraws([1, 2, 3], seed=0)
    drawn = draws.domains(0, 1000)
    for position in (0, 1, 63, 64, 65, 1000, 300, 999):
        assert draws.counts_before(position).tolist() == np.bincount(drawn[:position], minlength=3).tolist()


def test_weights_for_other_domains_are_an_error(dataset: BlockDataset) -> None:
    with pytest.raises(ValueError, match="weights for"):
        BatchLoader(dataset, batch_size=1, seed=0, weights={"ArXiv": 1.0})
    with pytest.raises(ValueError, match="--batch_size 0"):
        BatchLoader(dataset, batch_size=0, seed=0)


@pytest.mark.parametrize("weights", [None, {"a": 1.0, "b": 2.0}])
def test_a_step_costs_the_same_for_any_number_of_blocks(weights: dict | None) -> None:
    def cost(blocks: int) -> tuple[int, float]:
        """Peak bytes and median seconds of a step of 64 rows."""
        order = BatchOrder({"a": blocks, "b": blocks}, 0, weights)
        order.places(0, 64)
        tracemalloc.start()
        order.places(64, 64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        seconds = []
        for step in range(2, 40):
            start = time.perf_counter()
            order.places(64 * step, 64)
            seconds.append(time.perf_counter() - start)
        return peak, float(np.median(seconds))

    small_peak, small_seconds = cost(1000)
    large_peak, large_seconds = cost(10**9)
    assert large_peak < 2 * small_peak < 1_000_000
    assert large_seconds < 5 * small_seconds


# Validation rows


def test_validation_rows_are_fixed_distinct_and_seeded(dataset: BlockDataset) -> None:
    chosen = places(validation_batch(dataset, 20, seed=1))
    assert len(set(chosen)) == 20
    assert places(validation_batch(dataset, 20, seed=1)) == chosen
    assert places(validation_batch(dataset, 5, seed=1)) == chosen[:5]  # a larger batch extends a smaller one
    assert places(validation_batch(dataset, 20, seed=2)) != chosen
    assert len(set(places(validation_batch(dataset, 47, seed=1)))) == 47
    for m in (48, 0):
        with pytest.raises(ValueError, match=f"--val_batch_size {m}: there are 47 validation blocks of 8 "):
            validation_batch(dataset, m, seed=1)


# Runs


def write_lengths(data_dir: Path, split: str, tokens: dict[str, int]) -> None:
    """A split of domains with one document each."""
    (data_dir / split).mkdir()
    for domain, length in tokens.items():
        with ShardWriter(data_dir / split, domain, split=split, ids=GPT2_BYTES_IDS) as shard:
            shard.append(range(length))


def test_a_run_on_domains_of_which_some_have_no_whole_block(tmp_path: Path) -> None:
    """It trains, evaluates, resumes and is read by attribution."""
    write_lengths(tmp_path, "train", {"A": 5, "B, b": 60, "C": 90})
    write_lengths(tmp_path, "val", {"A": 60, "B, b": 4})
    write_lengths(tmp_path, "test", {"A": 60})
    flags = {"eval_interval": 2, "checkpoint_interval": 2, "run_name": "run", "lr_decay_steps": 4}
    first = start(tmp_path, tmp_path / "results", max_steps=2, **flags)
    assert first.status == 0, first.err
    again = start(tmp_path, tmp_path / "results", max_steps=4, resume=True, **flags)
    assert again.status == 0, again.err
    scores = again.scores()
    assert sorted(set(scores["step"])) == [0, 1, 2, 3]
    assert set(scores["domain"]) == {"B, b", "C"}
    assert (scores["sample_id"] >= 2**40).all()  # A, the domain without samples, keeps number 0
    run = ScoredRun.open(again.folder)
    assert run.domains == ("A", "B, b", "C") and run.blocks().domains == ("B, b", "C")
    values = write_values([run], tmp_path / "values")
    print_values(values, [run], None)


def test_the_log_names_domains_without_a_whole_block_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_lengths(tmp_path, "train", {"A, b": 5, "C": 60})
    write_lengths(tmp_path, "val", {"A, b": 60})
    flags = ["--pile_data_dir", str(tmp_path), "--block_size", "8", "--test_set", "train", "--device", "cpu"]
    config = resolve(TrainingConfig.from_command_line(flags))
    with TrainingData.open(config, World(0, 1, None)):
        pass
    assert [record.message for record in caplog.records] == [
        "domains without a whole block of 9 tokens (--block_size 8 and the last target) are not used: "
        '"A, b" in train (6 tokens)'
    ]


def test_more_shards_than_files_may_be_open(tmp_path: Path, few_descriptors: None) -> None:
    """180 domains in three splits are trained and evaluated on, and read by attribution."""
    for split in ("train", "val", "test"):
        write_lengths(tmp_path, split, {f"domain {number}": 20 for number in range(180)})
    run = start(tmp_path, tmp_path / "results", batch_size=100, eval_bs=4, max_steps=1, run_name="run")
    assert run.status == 0, run.err
    assert len(set(run.scores()["domain"])) > 60
    scored = ScoredRun.open(run.folder)
    print_values(write_values([scored], tmp_path / "values"), [scored], None)
    assert len(scored.shards()) == 180


# Lists of domains


def test_domains_are_parsed() -> None:
    def parsed(text: str) -> tuple[tuple[str, ...] | None, dict[str, float] | None]:
        selection = parse_domains(text, "train")
        assert selection.split == "train"
        return selection.domains, selection.weights

    assert parsed("ArXiv") == (("ArXiv",), None)
    assert parsed("Wikipedia (en), ArXiv") == (("Wikipedia (en)", "ArXiv"), None)
    assert parsed("Wikipedia (en):2,ArXiv: 0.5") == (
        ("Wikipedia (en)", "ArXiv"),
        {"Wikipedia (en)": 2.0, "ArXiv": 0.5},
    )
    assert parsed('"C4: news, en"') == (("C4: news, en",), None)
    assert parsed(' "C4: news, en" : 2 , ArXiv:1') == (
        ("C4: news, en", "ArXiv"),
        {"C4: news, en": 2.0, "ArXiv": 1.0},
    )
    assert parsed('"say ""hi""",12" records') == (('say "hi"', '12" records'), None)


@pytest.mark.parametrize("split", ["val", "val:ArXiv,Pile-CC", 'val:"C4: news, en", ArXiv'])
def test_a_set_is_a_split_or_some_of_its_domains(split: str) -> None:
    domains = {"val": None, "val:ArXiv,Pile-CC": ("ArXiv", "Pile-CC")}.get(split, ("C4: news, en", "ArXiv"))
    assert parse_set("--val_set", split) == Selection("--val_set", split, "val", domains)


NAMES = ["ArXiv", "C4: news, en", " space ", 'say "hi"', '"', '"",":', "a\nb", "it's", "中, 文"]


def test_any_name_can_be_quoted() -> None:
    """Also in what a message says to type: the shell and the list give back the names."""
    assert parse_domains(",".join(map(quoted, NAMES)), "train").domains == tuple(NAMES)
    weights = {name: number + 0.5 for number, name in enumerate(NAMES)}
    given = [
        parse_domains(",".join(f"{quoted(name)}:{weight}" for name, weight in weights.items()), "train"),
        parse_set("--val_set", "val:" + ",".join(map(quoted, NAMES))),
    ]
    for selection in given:
        flag, value = shlex.split(selection.only(NAMES[1:]))
        again = parse_domains(value, "train") if flag == "--domains" else parse_set(flag, value)
        assert again.domains == tuple(NAMES[1:])
        assert again.weights is None or again.weights == {name: weights[name] for name in NAMES[1:]}


def test_a_list_in_a_message_is_one_line() -> None:
    assert listed(["A", "b: c", "\x1b[31m\n."]) == 'A, "b: c", \\x1b[31m\\n.'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty name"),
        ("ArXiv,", "an empty name"),
        (":1", "an empty name"),
        ('""', "an empty name"),
        ("ArXiv,Pile-CC,ArXiv", "'ArXiv' is named twice"),
        ('ArXiv,"ArXiv"', "'ArXiv' is named twice"),
        ("ArXiv:1,ArXiv:2", "'ArXiv' is named twice"),
        ("ArXiv:1,Pile-CC", "'Pile-CC' has the weight '', not a number; all have one, or none"),
        ("ArXiv:one", "'ArXiv' has the weight 'one', not a number"),
        ("C4: news, en", "'C4' has the weight ' news', not a number.*a colon is put in double quotes"),
        ("ArXiv:0", "'ArXiv' has the weight '0', not a finite one above 0"),
        ("ArXiv:-1", "not a finite one above 0"),
        ("ArXiv:inf", "not a finite one above 0"),
        ("ArXiv:nan", "not a finite one above 0"),
        ('ArXiv,"C4', "the quotes at '\"C4' do not match"),
        ('"C4" news', "the quotes at '\"C4\" news' do not match"),
    ],
)
def test_domains_that_cannot_be_meant_are_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_domains(text, "train")
    assert str(error.value).startswith(f"--domains {text!r}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val:A:2", "only --domains takes weights"),
        ("val:C4: news, en", "a comma or a colon is put in double quotes"),
        ("val:", "must be SPLIT or SPLIT:DOMAIN,DOMAIN"),
        ("../val", "must be SPLIT or SPLIT:DOMAIN,DOMAIN"),
        ("val:A,,B", "an empty name"),
    ],
)
def test_sets_that_cannot_be_meant_are_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_set("--test_set", text)
    assert str(error.value).startswith(f"--test_set {text!r}: ")
