"""Queries: a text is found where it stands, whatever the tokens; what is told of it is what pandas finds."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import run_helpers
from run_helpers import DOMAINS, Run, start, write_shards

from attribution.database import ScoreDatabase
from attribution.errors import AttributionError
from attribution.options import run_command
from attribution.query import command as query
from attribution.query import text_search
from attribution.query.history import (
    Standing,
    find_block_uses,
    find_blocks,
    find_document_uses,
    find_standing,
)
from attribution.query.lookup import find_extreme_pairs, find_text, find_validation_row
from attribution.query.text_search import Place, find_documents
from attribution.scored_run import ScoredRun
from attribution.units import write_units
from data_processing.shard_files import ShardError
from data_processing.shards import GPT2_BYTES_IDS, GPT2_IDS, Shard, ShardWriter, open_shard
from data_processing.tokenizers import Gpt2Bytes, get_tokenizer

T = 32
VALIDATION_ROWS = 3
TRAINED = DOMAINS[1]


class Pieces(Gpt2Bytes):
    """A tokenizer of some byte strings, which may be parts of characters."""

    ids = replace(GPT2_IDS, tokenizer="pieces")

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        self._pieces = pieces

    def token_bytes(self) -> list[bytes]:
        return self._pieces + [b""] * (GPT2_IDS.vocabulary - len(self._pieces))


def first_places(shard: Shard, pieces: list[bytes], text: str) -> list[Place]:
    """The oracle: bytes.find in every document."""
    found = []
    stops = [*shard.document_starts[1:].tolist(), shard.num_tokens]
    for document, (start_token, stop) in enumerate(zip(shard.document_starts.tolist(), stops, strict=True)):
        texts = [
            b"\xff" if token == GPT2_IDS.end_of_text else pieces[token]
            for token in shard.tokens[start_token:stop]
        ]
        begin = b"".join(texts).find(text.encode())
        if begin >= 0:
            ends = np.cumsum([len(piece) for piece in texts])
            first, last = (int((ends <= place).sum()) for place in (begin, begin + len(text.encode()) - 1))
            found.append(Place(shard.domain, document, start_token + first, start_token + last + 1))
    return found


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_a_text_is_found_across_chunks_tokens_and_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(text_search, "CHUNK_TOKENS", chunk)
    draw = random.Random(chunk)
    euro = "€".encode()
    pieces = [b"a", b"b", b"ab", b"ba a", euro, euro[:1], euro[1:], euro[:2], euro[2:], b"a" + euro[:1]]
    with ShardWriter(tmp_path, "A", split="train", ids=Pieces.ids) as writer:
        for _ in range(40):
            writer.append(draw.choices(range(len(pieces)), k=draw.randrange(1, 9)))
        # Documents without END_OF_TEXT: what is found must not reach from one into the next.
        writer.extend_cut(np.array([0, 1, 0, 4, GPT2_IDS.end_of_text], "<u2"), np.array([0, 1, 3]))
    shard = open_shard(tmp_path / "A.json")
    hits = 0
    for text in ("a", "ab", "ba", "€", "a€", "€€", "aba", "ba a€", "bab a", "€a€", "b€ab€a"):
        expected = first_places(shard, pieces, text)
        assert list(find_documents([shard, shard], text, Pieces(pieces))) == expected * 2, text
        hits += len(expected)
    assert hits > 100


def test_a_token_that_the_tokenizer_does_not_have_is_an_error(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "A", split="train", ids=GPT2_BYTES_IDS) as writer:
        writer.append([5, 300])
    with pytest.raises(ShardError, match="token id 300 is none of this tokenizer's"):
        list(find_documents([open_shard(tmp_path / "A.json")], "x", get_tokenizer("gpt2_bytes")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On one domain of two, some of its samples twice."""
    folder = tmp_path_factory.mktemp("query")
    flags = {"block_size": T, "batch_size": 16, "max_steps": 6, "warmup_step": 0, "learning_rate": 0.03}
    scores = {"score_granularity": "pairwise", "val_batch_size": VALIDATION_ROWS}
    with patch.dict(run_helpers.DOCUMENTS, train=6):
        data = write_shards(folder / "shards")
    return start(data, folder, run_name="run", train_set=f"train:{TRAINED}", **flags, **scores)


@pytest.fixture(scope="module")
def run(trained: Run) -> ScoredRun:
    return ScoredRun.open(trained.folder)


@pytest.fixture(scope="module")
def shards(run: ScoredRun) -> list[Shard]:
    return run.shards()


@pytest.fixture
def database(run: ScoredRun) -> Iterator[ScoreDatabase]:
    with ScoreDatabase([run]) as opened:
        yield opened


@pytest.fixture
def ask(trained: Run, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """What the command prints; of an error the line on stderr."""

    def ask(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        assert run_command("attribution.query", query.main, [str(trained.folder), *arguments]) == status
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err
        return printed.err if status else printed.out

    return ask


def document_of(targets: list[int], shard: Shard) -> list[int]:
    return [sum(first <= target for first in shard.document_starts.tolist()) - 1 for target in targets]


def test_the_uses_of_a_sample_are_the_rows_of_the_scores(
    trained: Run, shards: list[Shard], database: ScoreDatabase
) -> None:
    scores = trained.scores()
    twice = scores["block"].value_counts().idxmax()
    for block, count in ((twice, 2), (scores["block"].iloc[0], None)):
        expected = scores[scores["block"] == block].sort_values("step")
        found = find_block_uses(database, TRAINED, range(block, block + 1)).to_pandas()
        assert count is None or len(found) == count
        for name in ("step", "train_loss", "lr", "dot_product", "value"):
            assert found[name].tolist() == expected[name].tolist()
    assert len(find_block_uses(database, DOMAINS[0], range(1000))) == 0, "never trained on"


def test_a_sample_stands_where_pandas_ranks_it(
    trained: Run, run: ScoredRun, database: ScoreDatabase, tmp_path: Path
) -> None:
    values = trained.scores().groupby("block")["value"].sum()
    units = write_units(database, run.samples(), "samples", tmp_path)
    for block in (values.idxmax(), values.idxmin(), values.index[5]):
        rank = int(values.rank(ascending=False, method="min")[block])
        found = find_standing(database, units, "samples", TRAINED, int(block))
        assert found is not None and found == Standing(
            found.value, rank, len(values), (values < values[block]).mean()
        )
        assert found.value == pytest.approx(values[block])
    assert find_standing(database, units, "samples", DOMAINS[0], 0) is None


def test_a_document_has_its_part_of_each_block(
    trained: Run, run: ScoredRun, shards: list[Shard], database: ScoreDatabase, tmp_path: Path
) -> None:
    scores, shard = trained.scores(), shards[1]
    parts = {
        block: pd.Series(document_of(list(range(block * T + 1, block * T + T + 1)), shard)).value_counts() / T
        for block in range((shard.num_tokens - 1) // T)
    }
    units = write_units(database, run.samples(), "documents", tmp_path)
    for document in range(shard.num_documents):
        expected = scores[[document in parts[block] for block in scores["block"]]].sort_values(
            ["step", "block"]
        )
        share = np.array([parts[block][document] for block in expected["block"]])
        found = find_document_uses(database, shard, document, T).to_pandas()
        assert found[["step", "block"]].to_numpy().tolist() == expected[["step", "block"]].to_numpy().tolist()
        np.testing.assert_allclose(found["share"], share, rtol=1e-12)
        np.testing.assert_allclose(found["value"], expected["value"] * share, rtol=1e-12)
        blocks = find_blocks(shard, document, T)
        assert list(blocks) == [block for block, share in parts.items() if document in share]
        own = find_standing(database, units, "documents", TRAINED, document)
        assert own is not None
        assert own.value == pytest.approx(found["value"].sum())
        assert own.count == shard.num_documents


def test_pairs_add_up_to_what_pandas_adds(trained: Run, database: ScoreDatabase) -> None:
    scores = trained.scores()
    for number in range(VALIDATION_ROWS):
        pair = scores["lr"] * scores["clip_factor"] / scores["global_batch_size"]
        pair *= [dots[number] for dots in scores["pairwise"]]
        expected = pair.groupby(scores["block"]).sum().sort_values(ascending=False)
        helped, _ = find_extreme_pairs(database, number, 5)
        assert helped["block"].to_pylist() == expected.index[:5].tolist()
        np.testing.assert_allclose(helped["value"], expected.iloc[:5], rtol=1e-12)
        database.connection.execute("DROP TABLE pairs")
    with ScoreDatabase(database.runs, normalise="absolute", steps=(1, 1)) as normalised:
        first = scores[scores["step"] == 1]
        helped, hurt = find_extreme_pairs(normalised, 0, 100)
        assert len(helped) + len(hurt) == len(first)
        dots = np.array([dots[0] for dots in first["pairwise"]])
        expected = first["lr"] * first["clip_factor"] * dots / 16 / first["value"].abs().sum()
        np.testing.assert_allclose(
            sorted([*helped["value"].to_pylist(), *hurt["value"].to_pylist()]), sorted(expected)
        )


def test_a_text_is_told_of_with_its_documents(
    shards: list[Shard], ask: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = get_tokenizer("gpt2_bytes")
    texts = {
        (shard.domain, document): tokenizer.decode(shard.tokens[first:].tolist()).split("<|endoftext|>")[0]
        for shard in shards
        for document, first in enumerate(shard.document_starts.tolist())
    }
    monkeypatch.setattr(query, "SHOWN_DOCUMENTS", 4)
    for text in ("Straße na", "of :tada: ", texts[TRAINED, 5][30:90]):
        expected = [key for key, whole in texts.items() if text in whole]
        shown = expected[:4]
        out = ask("--text", text)
        more = ", of which the first 4 are:" if len(expected) > 4 else ""
        assert out.startswith(f"{len(expected)} training documents contain the text{more}\n")
        told = [line.split(":")[0] for line in out.splitlines() if ", document " in line]
        assert told == [f"{domain}, document {number}" for domain, number in shown]
        unused = sum(domain != TRAINED for domain, _ in shown)
        assert out.count(f"never trained on in steps 0 to 5: it trained on {TRAINED}") == unused
        assert out.count(" of 6 documents with a value, higher than ") == len(shown) - unused
    assert shown == [(TRAINED, 5)]


def test_a_sample_is_told_of_with_its_text(
    trained: Run, shards: list[Shard], ask: Callable[..., str]
) -> None:
    block = int(trained.scores()["block"].value_counts().idxmax())
    out = ask("--sample", f"{TRAINED}:{block}")
    text = get_tokenizer("gpt2_bytes").decode(shards[1].tokens[block * T : block * T + T + 1].tolist())
    assert " ".join(text.replace("\x1b", " ").split()) in out
    assert "samples with a value, higher than" in out
    assert len(out.splitlines()) == 6, "two uses"
    scores = trained.scores()
    unused = min(set(scores["block"]) - set(scores.loc[scores["step"] == 2, "block"]))
    out = ask("--sample", f"{TRAINED}:{unused}", "--steps", "2:2")
    assert out.endswith("\nnever trained on in steps 2 to 2\n")


def test_a_validation_row_is_told_of_with_its_samples(run: ScoredRun, ask: Callable[..., str]) -> None:
    out = ask("--validation", "1")
    row = run.validation_rows().to_pylist()[1]
    assert out.startswith(f"validation row 1: {row['domain']}, block {row['block']}\n")
    assert out.count(f"{TRAINED}, block ") >= 10
    assert "samples that helped it most" in out


def test_what_is_not_there_is_an_error(run: ScoredRun, shards: list[Shard], ask: Callable[..., str]) -> None:
    find = {
        "text": lambda text: find_text(shards, text, 10),
        "sample": lambda sample: run.samples().find(sample),
        "validation": lambda number: find_validation_row(run, int(number)),
    }
    nowhere = f"none of the 12 training documents in {shards[0].path.parent} contains it"
    for option, value, message in (
        ("text", "", "is everywhere"),
        ("text", "no such words", nowhere),
        ("text", "\udcff", "is not UTF-8"),
        ("sample", "Gamma:0", r"there is no domain 'Gamma' in .*, but Alpha, Beta \[b\]$"),
        ("sample", TRAINED, "give DOMAIN:BLOCK"),
        ("sample", f"{TRAINED}:-1", "give DOMAIN:BLOCK"),
        ("sample", f"{TRAINED}:9999", "blocks of 32 tokens, counted from 0"),
        ("validation", "3", "has 3 validation rows, counted from 0"),
        ("validation", "-1", "has 3 validation rows, counted from 0"),
    ):
        with pytest.raises(AttributionError, match=message):
            find[option](value)
    total = replace(run, metadata={**run.metadata, "granularity": "total"})
    with pytest.raises(AttributionError, match="train with --score_granularity pairwise"):
        find_validation_row(total, 0)
    assert ask("--validation", "3", status=2).startswith("attribution.query: error: --validation 3: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "-O2"], "--text: none of the 12 training documents in "),
        (["--text", "--foo"], "--text: none of the 12 training documents in "),
        (["--sample", "-x:3"], "--sample '-x:3': there is no domain '-x'"),
        (["--text", "of", "--steps", "-5:1"], "--steps '-5:1': give FIRST:LAST"),
    ],
)
def test_a_value_may_begin_with_a_dash(ask: Callable[..., str], arguments: list[str], message: str) -> None:
    assert ask(*arguments, status=2).startswith(f"attribution.query: error: {message}")
