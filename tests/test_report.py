"""The report as a file: as a browser reads it, with hostile texts, and its numbers against pandas."""

import base64
import json
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from run_helpers import Run, start, write_shards
from score_folders import scores_of, write_run

from attribution.audit import audit_lines, measure_audit
from attribution.database import ScoreDatabase
from attribution.errors import AttributionError
from attribution.options import run_command
from attribution.pieces import Pieces, Word
from attribution.report.command import NEEDED_SETTINGS, main, write_report
from attribution.report.page import format_scaled, word_title
from attribution.report.plots import choose_scale
from attribution.report.tables import (
    average_domains,
    average_neighbours,
    collect_evaluations,
    count_by_value,
    count_samples,
    sum_domains_by_step,
)
from attribution.report.texts import describe_words
from attribution.report.word_colours import colour_words
from attribution.scored_run import ScoredRun
from attribution.values import write_values
from attribution.visible_text import visible
from attribution.words import why_none
from data_processing.blocks import BLOCK_BITS, BlockDataset
from data_processing.domain_lists import parse_set
from data_processing.shards import GPT2_BYTES_IDS, ShardWriter
from data_processing.tokenizers import byte_ids, get_tokenizer
from score_store.pieces import pieces_of
from score_store.samples import OWN

T = 96  # block size: a hostile text fits in whole
DATE = datetime(2030, 1, 2, 3, 4, tzinfo=UTC)
HOSTILE = (
    "<script>alert(1)</script>",
    '"onmouseover="alert(2)',
    "'><img src=x onerror=alert(3)>",
    "</pre></details></body></html><h1>the end</h1>",
    "{{ 7 * 7 }}{% include 'report.css' %}",
    "\x1b[31mred\x00\x07",
    "\u202egnirts desrever\u2066",
    "<!-- ]]> &amp; &#60;b&#62;",
    "https://example.invalid/?a=1&b=2",
)
DOMAINS = ("<b>$x^2$ & 'Alpha'", '_"\u202eBeta\x1b]" onload="alert(4)')
SVG = "data:image/svg+xml;base64,"
TITLE = r"(\S+) × (10\S+) nats( \((\d+) tokens\))?"  # of a word
VOID = {"area", "br", "img", "input", "link", "meta", "source", "wbr"}


def hostile_shards(folder: Path) -> Path:
    """A split of few blocks, so that each one is shown."""
    encode = get_tokenizer("gpt2_bytes").encode
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        for domain in DOMAINS:
            with ShardWriter(folder / split, domain, split=split, ids=GPT2_BYTES_IDS) as shard:
                for number in range(4):
                    texts = HOSTILE[number::4]
                    shard.append(encode(f"{split} {number} " + " ".join(texts) + " end " * 8))
                shard.append(byte_ids()[[0xFF, 0xC3, 0x28, 0x80] * 10])  # not UTF-8
    return folder


@dataclass
class Element:
    """parent is None of the root alone; text: its own and that of what is in it."""

    tag: str
    attributes: dict[str, str]
    children: list["Element"] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str) -> Iterator["Element"]:
        for child in self.children:
            if child.tag == tag:
                yield child
            yield from child.all(tag)

    def by_id(self, name: str) -> "Element":
        (found,) = [each for each in self.everything() if each.attributes.get("id") == name]
        return found

    def everything(self) -> Iterator["Element"]:
        for child in self.children:
            yield child
            yield from child.everything()


class Page(HTMLParser):
    """A tree of elements. Tags that do not match, and attributes given twice, are errors."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(html)
        self.close()
        assert self._open == [self.root], [each.tag for each in self._open]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes), attributes
        element = Element(tag, {name: value or "" for name, value in attributes})
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert tag == self._open[-1].tag, (tag, self.getpos())
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("hostile")
    run = start(
        hostile_shards(folder / "<data>"), folder / "results", run_name='"><i>run', block_size=T,
        max_steps=7, eval_interval=4, learning_rate=0.02, audit_interval=3, score_granularity="token",
    )  # fmt: skip
    assert run.status == 0, run.err
    scatter_signs(run.folder / "grad_dotprods")
    assert run_command("attribution.report", main, [str(run.folder)]) == 0
    write_values([ScoredRun.open(run.folder)], run.folder / "values")
    return run


def scatter_signs(scores: Path) -> None:
    """Makes some samples harmful, which none is in so few steps."""
    for path in scores.iterdir():
        table = pq.read_table(path)
        signs = pa.array(np.where(table["block"].to_numpy() < 2, -1.0, 1.0))
        for name in ("value", "dot_product"):
            place, column = table.column_names.index(name), table.schema.field(name)
            table = table.set_column(place, column, pc.multiply(table[name], signs))
        rows = zip(signs.tolist(), table["token"].to_pylist(), strict=True)
        parts = [[sign * part for part in row] for sign, row in rows]
        place = table.column_names.index("token")
        table = table.set_column(place, table.schema.field("token"), pa.array(parts))
        pq.write_table(table, path)


@pytest.fixture(scope="module")
def html(run: Run) -> str:
    return (run.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Element:
    return Page(html).root


@pytest.fixture(scope="module")
def by_sample(run: Run) -> pd.DataFrame:
    """Value and number of uses of each sample."""
    return run.scores().groupby(["domain", "block"])["value"].agg(["sum", "count"])


def numbers(element: Element) -> list[float]:
    return [float(each.attributes["value"]) for each in element.all("data")]


def svgs(page: Element) -> Iterator[tuple[Element, ElementTree.Element]]:
    """Each image with the two SVGs of it."""
    for picture in page.all("picture"):
        (source,), (image,) = picture.all("source"), picture.all("img")
        for address in (image.attributes["src"], source.attributes["srcset"]):
            head, _, data = address.partition(",")
            assert f"{head}," == SVG
            yield image, ElementTree.fromstring(base64.b64decode(data, validate=True))


def test_the_page_needs_nothing_else_and_runs_nothing(page: Element, html: str) -> None:
    tags = {element.tag for element in page.everything()}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "svg"}
    for element in page.everything():
        assert not [name for name in element.attributes if name.startswith("on") or name == "style"]
        for name in ("src", "srcset"):
            assert element.attributes.get(name, SVG).startswith(SVG)
        assert element.attributes.get("href", "#").startswith("#")
    for _, svg in svgs(page):
        links = [value for each in svg.iter() for name, value in each.attrib.items() if name.endswith("href")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
        assert not {each.tag.rpartition("}")[2] for each in svg.iter()} & {"script", "foreignObject"}
    assert "@import" not in html
    assert "url(" not in html
    policies = [each.attributes for each in page.all("meta") if "http-equiv" in each.attributes]
    assert [policy["http-equiv"] for policy in policies] == ["Content-Security-Policy"]
    assert policies[0]["content"].startswith("default-src 'none'; img-src data:;")
    assert "script" not in policies[0]["content"]


def test_a_person_can_read_it_on_any_screen(page: Element) -> None:
    (root,) = page.all("html")
    assert root.attributes["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [
        each.attributes for each in page.all("meta")
    ]
    assert len(list(page.all("h1"))) == 1
    targets = [each.attributes["href"][1:] for each in page.all("a")]
    assert all(page.by_id(target).tag == "section" for target in targets)
    assert {each.attributes["id"] for each in page.all("section")} <= set(targets)
    for table in page.all("table"):
        assert all(each.attributes["scope"] in ("col", "row") for each in table.all("th"))


def test_every_plot_has_an_alternative_text_and_labels_at_its_axes(page: Element) -> None:
    labels = [
        {"training step", r"loss \(nats per token\)"},
        {r"mean value( per sample)? \(.*nats\)", r"domain \(samples\)"},
        {"training step", r"share of absolute value \(%\)"},
        {"training step", "domain", r"mean value \(.*typical.*\)"},
        {r"value of a sample \(.*nats\)", "number of samples"},
        {r"in-pass value \(.*nats\)", r"exact value \(.*nats\)"},
        {"training step", r"fall in the step \(.*nats\)"},
    ]
    found = list(svgs(page))
    assert len(found) == 2 * len(labels)
    for (image, svg), wanted in zip(found, [each for each in labels for _ in range(2)], strict=True):
        assert len(image.attributes["alt"]) > 40
        texts = ["".join(each.itertext()).strip() for each in svg.iter() if each.tag.endswith("}text")]
        for label in wanted:
            assert any(re.fullmatch(label, text) for text in texts), (label, texts)


def test_hostile_texts_stay_texts(page: Element, html: str) -> None:
    shown = [each.text for each in page.all("pre")]
    for text in HOSTILE:
        assert any(visible(text) in each for each in shown), text
    assert any("�" in each for each in shown)  # what is not UTF-8
    for raw in ("<script", "<img src=x", "<h1>the end", '="alert', "49{", "<b>", "<i>"):
        assert raw not in html
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", html)
    domains = [each.text for each in page.by_id("domains").all("bdi")]
    assert sorted(domains) == sorted(map(visible, DOMAINS))
    for _, svg in list(svgs(page))[2:4]:
        texts = ["".join(each.itertext()) for each in svg.iter() if each.tag.endswith("}text")]
        assert any("<b>$x^2$ &" in text for text in texts)


def test_domains_are_what_pandas_makes_of_the_scores(page: Element, by_sample: pd.DataFrame) -> None:
    (table,) = page.by_id("domains").all("table")
    rows = list(next(table.all("tbody")).all("tr"))
    values = by_sample["sum"].groupby("domain")
    want = pd.DataFrame(
        {
            "mean": values.mean(), "negative": values.agg(lambda of: (of < 0).mean()), "sum": values.sum(),
            "share": values.agg(lambda of: of.abs().sum()) / by_sample["sum"].abs().sum(),
            "samples": values.size(), "uses": by_sample["count"].groupby("domain").sum(),
        }
    ).sort_values("mean", ascending=False)  # fmt: skip
    assert [next(row.all("th")).text for row in rows] == [visible(domain) for domain in want.index]
    np.testing.assert_allclose([numbers(row) for row in rows], want, rtol=1e-9)


@pytest.mark.parametrize(("title", "sign"), [("helpful-samples", 1), ("harmful-samples", -1)])
def test_the_most_extreme_samples_are_those_of_pandas(
    page: Element, run: Run, by_sample: pd.DataFrame, title: str, sign: int
) -> None:
    values = (sign * by_sample["sum"]).nlargest(10)
    values = sign * values[values > 0]
    assert len(values) > 0
    entries = entries_after(page.by_id("samples"), title)
    names = [f"{visible(domain)}, block\xa0{block}" for domain, block in values.index]
    np.testing.assert_allclose([numbers(entry)[0] for entry in entries], values, rtol=1e-9)
    scores = run.scores().set_index(["domain", "block"]).sort_values("step")
    for entry, place, name in zip(entries, values.index, names, strict=True):
        uses = scores.loc[[place]]
        want = [values[place], values[place]]  # in the summary and below it
        for step, value in zip(uses["step"], uses["value"], strict=True):
            want += [step, value] if len(uses) > 1 else [step]
        np.testing.assert_allclose(numbers(entry), want, rtol=1e-9)
        assert name in entry.text


def entries_after(section: Element, title: str) -> list[Element]:
    """The entries of the list that follows the heading of that id."""
    names = [child.attributes.get("id") for child in section.children]
    after = section.children[names.index(title) :]
    return next(list(child.all("li")) for child in after if child.tag == "ol")


def test_words_are_coloured_by_position(page: Element, run: Run) -> None:
    """Each text is whole, and what its words have in their titles is its value, to three digits."""
    words = pd.read_parquet(run.folder / "values" / "words.parquet").set_index(["domain", "block"])
    tokens = BlockDataset.open(run.folder.parent.parent / "<data>", T, parse_set("--train_set", "train"))
    tokenizer = get_tokenizer("gpt2_bytes")
    shown = 0
    for title in ("helpful-samples", "harmful-samples"):
        for entry in entries_after(page.by_id("samples"), title):
            domain, block = next(
                place for place in words.index if f"{visible(place[0])}, block\xa0{place[1]}\n" in entry.text
            )
            parts = words.parts[domain, block]
            (text,) = entry.all("pre")
            spans = list(text.all("span"))
            assert text.text == visible(tokenizer.decode(tokens.tokens(domain, block).tolist()))
            titles: list[Any] = [re.fullmatch(TITLE, each.attributes["title"]) for each in spans]
            assert all(titles) and len({title[2] for title in titles}) == 1
            values = [float(title[1].replace("−", "-")) for title in titles]
            scale = {"10⁻³": 1e3, "10⁻⁶": 1e6, "10⁻⁹": 1e9}[titles[0][2]]
            assert sum(values) == pytest.approx(sum(parts) * scale, abs=2e-3 * np.abs(parts).sum() * scale)
            assert sum(int(title[4] or 1) for title in titles) in (T, T + 1)
            for each, value in zip(spans, values, strict=True):
                kind, _, level = each.attributes["class"].partition("-")
                assert kind in ("even", "help" if value > 0 else "hurt")
                assert kind == "even" or 1 <= int(level) <= 5
            (legend,) = [each for each in entry.all("p") if each.attributes.get("class") == "scale"]
            end = np.quantile(np.abs(values), 0.95)
            ends = [float(each.replace("−", "-")) for each in re.findall(r"[+−][\d.]+", legend.text)]
            assert ends == pytest.approx([-end, end], rel=0.01) and len(list(legend.all("span"))) == 11
            assert titles[0][2] in legend.text and "nats and beyond" in legend.text
            shown += len(spans)
    assert shown > 5 * T
    assert "coloured by position: where a weight was used" in page.by_id("samples").text
    assert "It is not what the word as a target did" in page.by_id("samples").text
    assert "documents by position: a document has the parts" in " ".join(page.by_id("documents").text.split())


def test_pieces_and_words() -> None:
    """A character of several tokens is shown once, with the sum of their parts."""
    text = "naïve 🔬!"
    tokenizer = get_tokenizer("gpt2_bytes")
    tokens = tokenizer.encode(text).tolist()
    pieces = pieces_of(tokenizer.decode, tokens)
    assert (
        "".join(pieces) == text
        and pieces[:5] == ["n", "a", "", "ï", "v"]
        and pieces[-5:-1] == ["", "", "", "🔬"]
    )
    cut = pieces_of(tokenizer.decode, tokens[:-2])
    assert "".join(cut) == tokenizer.decode(tokens[:-2]) and "�" in cut
    assert pieces_of(tokenizer.decode, []) == []
    replacement = tokenizer.encode("a\ufffd\ufffdb").tolist()  # three tokens each, as the text has it
    assert pieces_of(tokenizer.decode, replacement) == ["a", "", "", "\ufffd", "", "", "\ufffd", "b"]
    decoded = []

    def joined(ids: list[int]) -> str:  # looks back to the first token
        decoded.append(len(ids))
        return "".join(f"{ids[0]}{each}" for each in ids)

    assert pieces_of(tokenizer.decode, long := tokens * 50)[-len(tokens) :] == pieces and len(long) > 500
    assert pieces_of(joined, [1, 2, 3]) == ["11", "12", "13"]
    decoded.clear()

    def plain(ids: list[int]) -> str:
        decoded.append(len(ids))
        return tokenizer.decode(ids)

    assert "".join(pieces_of(plain, long)) == text * 50 and sum(decoded) < 20 * len(long), "not quadratic"
    parts = [float(2**place) for place in range(len(tokens))]
    found = Pieces(pieces, len(pieces), "sample 1").words([*parts[:-1], 0.0], "target")
    assert [(each.text, each.value, each.tokens) for each in found[:4]] == [
        ("n", None, 1), ("a", 1.0, 1), ("ï", 6.0, 2), ("v", 8.0, 1)
    ]  # fmt: skip
    assert sum(each.value or 0 for each in found) == sum(parts[:-1])
    at = Pieces(["a", "b", ""], 3, "sample 1").words([1.0, 2.0], "position")
    assert at == [Word("a", 1.0, 1), Word("b", 2.0, 2)]
    wrongs: list[tuple[list[float], Any]] = [([1], "target"), ([1, 2, 3], "target"), ([1], "position")]
    for wrong, by_word in wrongs:
        with pytest.raises(
            AttributionError,
            match=r"sample 1 has 3 tokens, and \d parts of its value that are not theirs: give .*, T\+1 in all",
        ):
            Pieces(["a", "b", ""], 3, "sample 1").words(wrong, by_word)
    # A token that is no target has no part.
    masked = Pieces(["a", "b", "c"], 3, "sample 1").words([0.0, 2.0], "target")
    assert [word.value for word in masked] == [None, None, 2.0]
    assert Pieces(["a", "b"], 3, "sample 1").words([1.0, 2.0], "target") == [
        Word("a", None, 1),
        Word("b", 1.0, 1),
    ]


def test_what_the_colours_say(made: ScoredRun) -> None:
    assert "coloured by target: what each word, as a target, did." in describe_words("target", [made], True)
    assert "no text of each token" in describe_words("target", [made], False)
    assert "there is no split by word (train with --values exact" in describe_words(None, [made], False)
    own = replace(made, metadata=made.metadata | {"samples": OWN})
    of_loop = describe_words(None, [own], False)
    assert "--" not in of_loop and 'write_run(values="exact", by_target=True)' in of_loop
    exact = replace(own, metadata=own.metadata | {"values": "exact", "granularity": "token"})
    assert "and these are exact: ask for Scoring(every_exact=True, by_target=True) in" in why_none([exact])
    prompt = [Word("p", 0.0, 1)] * 100  # no part of the scale
    assert colour_words(prompt, "nats").end == 0
    coloured = colour_words([Word("a", None, 1), Word("b", 2e-6, 1), Word("c", -1e-9, 2), *prompt], "nats")
    assert [coloured.level(value) for value in (1.0, 1e-6, 1e-9, 0.0, -1e-6, -1.0)] == [5, 3, 0, 0, -3, -5]
    assert word_title(coloured.words[1], coloured.scale) == "+2.00 × 10⁻⁶ nats"
    assert word_title(coloured.words[2], coloured.scale) == "−0.00100 × 10⁻⁶ nats (2 tokens)"


def test_documents_add_up_to_the_samples(page: Element, by_sample: pd.DataFrame) -> None:
    """There are so few that all are shown."""
    section = page.by_id("documents")
    shown = [
        numbers(entry)[0]
        for title in ("helpful-documents", "harmful-documents")
        for entry in entries_after(section, title)
    ]
    assert len(shown) == 10
    assert sum(shown) == pytest.approx(by_sample["sum"].sum(), rel=1e-9)


def test_the_check_says_what_the_audit_says(page: Element, run: Run) -> None:
    scored = ScoredRun.open(run.folder)
    with ScoreDatabase([scored]) as database:
        lines = audit_lines([scored], measure_audit(database))
    text = " ".join(page.by_id("check").text.split())
    assert len(lines) >= 1 and "too few to say" in lines[0]
    assert all(" ".join(visible(line).split()) in text for line in lines)
    assert "not those of AdamW: a ranking at best" in " ".join(page.by_id("brief").text.split())


def test_validation_rows_and_settings_are_shown(page: Element, run: Run) -> None:
    rows = pd.read_parquet(run.folder / "validation" / "rows.parquet")
    shown = [each.text for each in page.by_id("validation").all("pre")]
    assert shown == [visible(text) for text in rows["text"]]
    table = page.by_id("configuration")
    settings = {
        next(row.all("th")).text: next(row.all("td")).text.strip()
        for row in table.all("tr")
        if list(row.all("td"))
    }
    config = json.loads((run.folder / "config.json").read_text())
    assert settings.keys() == config.keys()
    assert settings["learning_rate"] == "0.02"
    assert settings["compile"] == "no"
    assert settings["domains"] == "not set"
    assert settings["betas"] == "0.9, 0.95"


def test_the_same_run_gives_the_same_file_but_for_the_date(run: Run, html: str, tmp_path: Path) -> None:
    output = tmp_path / "again.html"
    write_report([ScoredRun.open(run.folder)], output, date=DATE)
    again = output.read_text(encoding="utf-8")
    assert "Made on 2030-01-02 03:04 UTC," in again
    made = r"Made on [-\d]+ [\d:]+ UTC"
    assert re.sub(made, "", again) == re.sub(made, "", html)
    assert [path.name for path in tmp_path.iterdir()] == ["again.html"]


def test_several_runs_a_window_and_normalised_values(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "attribution.report.plots._address", lambda *_, **__: SVG
    )  # drawing takes most of the time
    other = Path(shutil.copytree(run.folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"weight_decay": 0.25}))
    output = tmp_path / "both.html"
    runs = [ScoredRun.open(run.folder), ScoredRun.open(other)]
    write_report(runs, output, normalise="absolute", steps=(2, 5), date=DATE)
    page = Page(output.read_text(encoding="utf-8")).root
    scores = run.scores().query("2 <= step <= 5")
    scores["value"] /= scores.groupby("step")["value"].transform(lambda of: of.abs().sum())
    values = scores.groupby(["domain", "block"])["value"].sum()  # the mean of two runs that are the same
    best = entries_after(page.by_id("samples"), "helpful-samples")[0]
    assert numbers(best)[0] == pytest.approx(values.max(), rel=1e-9)
    assert "2 to 5" in page.by_id("brief").text
    assert "divided by the sum of their absolute values" in page.by_id("brief").text
    (row,) = [each for each in page.by_id("configuration").all("tr") if "weight_decay" in each.text]
    assert '"><i>run: 0.1' in row.text
    assert "other: 0.25" in row.text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ScoredRun:
    """Random scores; step 5 was skipped, and step 0 had a learning rate of 0."""
    folder = tmp_path_factory.mktemp("made")
    data = write_shards(folder / "data")
    return ScoredRun.open(write_run(folder / "run", data, steps=70, null_steps=[5], zero_steps=[0]))


def test_tables_are_those_of_pandas(made: ScoredRun, tmp_path: Path) -> None:
    scores = scores_of(made.folder)
    by_sample = scores.groupby("sample_id")["value"].sum(min_count=1)
    values = write_values([made], tmp_path / "values")
    with ScoreDatabase([made]) as database:
        bins, spread = sum_domains_by_step(database), average_domains(database, values)
        bars, total = count_by_value(database, values), count_samples(database, values)
    assert bins.edges.tolist() == [*range(0, 70, 3), 70]
    scores["bin"] = scores["step"] // 3
    for name, part in (("helpful", scores[scores["value"] > 0]), ("harmful", scores[scores["value"] < 0])):
        want = part.pivot_table("value", "domain", "bin", "sum", fill_value=0)
        got = pd.DataFrame(getattr(bins, name), list(bins.domains)).loc[want.index, want.columns]
        np.testing.assert_allclose(got, want)
        assert getattr(bins, name).sum() == pytest.approx(want.to_numpy().sum())
    assert bins.uses.sum() == scores["value"].count()
    valued = by_sample.dropna()
    names = np.array(made.domains)[valued.index.to_numpy() >> BLOCK_BITS]
    for mean in spread:
        own = valued[names == mean.domain]
        assert mean.samples == len(own)
        assert (mean.mean, mean.error) == pytest.approx((own.mean(), own.sem()))
    assert bars.counts.sum() == total.valued == len(valued)
    assert total.samples == len(by_sample)
    inside = np.histogram(valued, bars.edges)[0]
    np.testing.assert_array_equal(bars.counts[1:-1], inside[1:-1])
    assert inside.sum() >= 0.99 * len(valued)
    assert bars.share_negative == total.share_negative == (valued < 0).mean()
    assert total.negative_part == pytest.approx(-valued[valued < 0].sum() / valued.abs().sum())


def test_a_run_without_any_value_has_no_report(made: ScoredRun, tmp_path: Path) -> None:
    data = Path(made.config["pile_data_dir"])
    run = ScoredRun.open(write_run(tmp_path / "skipped", data, steps=2, null_steps=[0, 1]))
    skipped = replace(run, config={**run.config, **dict.fromkeys(NEEDED_SETTINGS, "any")})
    with pytest.raises(AttributionError, match=r"no step of .*skipped has values"):
        write_report([skipped], tmp_path / "report.html")
    assert not [path for path in tmp_path.iterdir() if path.name != "skipped"]


def test_a_run_of_another_version_is_refused(made: ScoredRun, tmp_path: Path) -> None:
    with pytest.raises(AttributionError, match=r"config\.json has no val_set: another version"):
        write_report(
            [replace(made, config={"optimizer": "SGD", "direction": "gradient", "val_batch_size": 1})],
            tmp_path / "report.html",
        )


def test_an_output_that_cannot_be_written_is_named(made: ScoredRun, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for output in (tmp_path, tmp_path / "nowhere" / "report.html", tmp_path / "pipe"):
        with pytest.raises(AttributionError, match=re.escape(f"--output {output}")):
            write_report([made], output)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\r\nb\tc", "a\nb\tc"),
        ("a\rb", "a⟦U+000D⟧b"),
        ("\x1b[0m\x7f", "⟦U+001B⟧[0m⟦U+007F⟧"),
        ("\u202eabc\u2069\u200f", "⟦U+202E⟧abc⟦U+2069⟧⟦U+200F⟧"),
        ("می\u200cخواهم 👩\u200d🔬 Straße", "می\u200cخواهم 👩\u200d🔬 Straße"),
        ("\U000e0041\ufeff\udc80\ue000\u2028", "⟦U+E0041⟧⟦U+FEFF⟧⟦U+DC80⟧⟦U+E000⟧⟦U+2028⟧"),
    ],
)
def test_what_has_no_glyph_is_shown_by_its_number(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("largest", "value", "unit", "shown"),
    [
        (1.13e-4, 1.127e-4, "10⁻⁶ nats", "+113"),
        (1.13e-4, -2e-8, "10⁻⁶ nats", "−0.0200"),
        (0.5, 0.5, "10⁻³ nats", "+500"),
        (12.0, -8.0, "nats", "−8.00"),
        (45_000.0, 45_000.0, "10³ nats", "+45.0"),
        (0.0, 0.0, "nats", "+0.00"),
    ],
)
def test_units_make_numbers_of_one_to_three_places(
    largest: float, value: float, unit: str, shown: str
) -> None:
    found = choose_scale(largest, "nats")
    assert (found.name, format_scaled(value, found)) == (unit, shown)


def test_curves_are_means_of_neighbours_and_evaluations_of_the_window() -> None:
    assert average_neighbours(np.arange(7), 3).tolist() == [1, 4, 6]
    records: list[dict[str, Any]] = [
        {"step": 1, "loss/val": 5.0},
        {"step": 3, "loss/val": None},
        {"step": 3, "train_loss": 1.0},
    ]
    steps, losses = collect_evaluations(records, "loss/val", 2, 9)
    assert steps.tolist() == [3]
    assert np.isnan(losses).all()
