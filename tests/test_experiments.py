"""What the experiments under benchmarks/ count with."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_helpers import write_shards

from benchmarks.domain_ranking import rank_domains
from benchmarks.experiment import compute_auroc, cut_head, train, write_without_blocks
from benchmarks.paraphrases import edit_text
from data_processing.shards import GPT2_IDS, list_shards


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    random = np.random.default_rng(0)
    low, high = random.integers(0, 6, 20).astype(float), random.integers(2, 9, 30).astype(float)
    pairs = [(a < b) + (a == b) / 2 for a in low for b in high]
    assert compute_auroc(low, high) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert compute_auroc(high + 10, low) == 0.0


def test_ranking_and_its_baseline() -> None:
    random = np.random.default_rng(0)
    samples = pd.DataFrame({"domain": ["a"] * 100 + ["b"] * 100 + ["few"], "value": random.normal(size=201)})
    samples.loc[samples.domain == "b", "value"] += 1
    found = rank_domains(samples)
    assert found.index.tolist() == ["b", "a"]  # and not the one of a single sample
    assert found["mean"]["b"] == pytest.approx(samples.value[samples.domain == "b"].mean())
    assert found["mean"]["b"] > found.high["b"] > samples.value.mean() > found.low["b"]


def test_edits_leave_out_and_exchange_words() -> None:
    text = " ".join(f"w{number}" for number in range(1000))
    assert edit_text(text, 0.0, np.random.default_rng(0)) == text
    words = edit_text(text, 0.4, np.random.default_rng(0)).split()
    assert 750 < len(words) < 850 and set(words) < set(text.split())
    order = [int(word[1:]) for word in words]
    assert 100 < sum(a > b for a, b in pairwise(order)) < 300


def test_smaller_data(tmp_path: Path) -> None:
    shard = list_shards(write_shards(tmp_path / "data"), "train")[0]
    head = cut_head(shard, 101)
    assert head[:-1].tolist() == shard.tokens[: len(head) - 1].tolist() and head[-1] == GPT2_IDS.end_of_text
    assert len(head) == 101
    source = tmp_path / "data"
    folder = write_without_blocks(source, tmp_path / "less", 100, {"Alpha": [0, 2]})
    left = list_shards(folder, "train")[0].tokens
    assert left[:200].tolist() == [*shard.tokens[100:200], *shard.tokens[300:400]]
    blocks = (shard.num_tokens - 1) // 100
    rest = write_without_blocks(source, tmp_path / "none", 100, {"Alpha": list(range(blocks))})
    assert [each.domain for each in list_shards(rest, "train")] == ["Beta [b]"]


def test_a_run_with_other_flags_is_not_taken_for_this_one(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "run"
    (folder / "model").mkdir(parents=True)
    settings = {
        "architecture": "GPT2-Tiny", "device": "cpu", "eval_iter": 8, "eval_bs": 16, "warmup_step": 20,
        "checkpoint_interval": 1_000_000, "results_dir": str(folder.parent), "run_name": "run",
        "max_steps": 3,
    }  # fmt: skip
    (folder / "config.json").write_text(pd.Series(settings).to_json())
    assert train(tmp_path, "run", max_steps=3) == folder
    with pytest.raises(SystemExit, match="--max_steps 3, not 4"):
        train(tmp_path, "run", max_steps=4)
