"""LLaVA's records: what is refused and why, the tokens and targets of a row, and the demo set."""

import json
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from run_helpers import tree

from data_processing import llava_demo, llava_records
from data_processing.demo_corpus import DemoError
from data_processing.llava_demo import COLOURS, COUNTS, IMAGES, QUESTIONS, SHAPES, draw_image, make_demo
from data_processing.llava_records import (
    IGNORED,
    LlavaRecord,
    RecordError,
    encode_record,
    open_image,
    read_records,
)
from data_processing.tokenizers import get_tokenizer

BEGIN, END, PICTURE = 1001, 1002, 1003  # ids that Letters never makes


class Letters:
    """One id a character, so that expected rows can be written by hand."""

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(character) for character in text], np.uint16)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file with this header, then these chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in [(b"IHDR", header), *chunks, (b"IEND", b"")]:
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    noise = Image.frombytes("RGB", (64, 64), Random(0).randbytes(3 * 64 * 64))
    for name in ("a.png", "b.jpg", "c.gif", "d.webp", "e.bmp"):
        noise.save(folder / "coco" / name)
    noise.save(folder / "top.png")
    noise.save(tmp_path / "outside.png")
    return folder


def record(**changes: Any) -> dict[str, Any]:
    return {
        "id": "seven",
        "image": "coco/a.png",
        "conversations": turns("<image>\nWhat?", "Red."),
    } | changes


def turns(*texts: str, first: Literal[0, 1] = 0) -> list[dict[str, str]]:
    roles = ("human", "gpt")
    return [{"from": roles[(position + first) % 2], "value": text} for position, text in enumerate(texts)]


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in record().items() if key != name}


def written(folder: Path, content: object) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps(content))
    return path


BAD: dict[str, tuple[Any, str]] = {
    "no object": (["x"], "it is of type list, not an object"),
    "no id": (without("id"), "it has no 'id'"),
    "an id that is true": (record(id=True), "it has no 'id'"),
    "no image": (without("image"), "it has no image"),
    "an empty path": (record(image=""), "it has no image"),
    "several images": (record(image=["a.png", "b.png"]), "its image is of type list"),
    "a missing image": (record(image="coco/z.png"), "image 'coco/z.png' is no file in "),
    "a folder": (record(image="coco"), "image 'coco' is no file in "),
    "an endless path": (record(image="x" * 5000), "is no file in "),
    "a zero byte": (record(image="coco/\0.png"), "is no file in "),
    "a parent": (record(image="../outside.png"), "image '../outside.png' leaves the image folder"),
    "a parent further on": (record(image="coco/../../outside.png"), "leaves the image folder"),
    "an absolute path": (record(image="/etc/passwd"), "image '/etc/passwd' leaves the image folder"),
    "no conversations": (without("conversations"), "it has no 'conversations'"),
    "no turns": (record(conversations=[]), "it has no 'conversations'"),
    "a turn of text": (record(conversations=["<image>"]), "turn 0 is no object with a string 'value'"),
    "a value of 5": (record(conversations=[{"from": "human", "value": 5}]), "turn 0 is no object"),
    "a role": (record(conversations=[{"from": "system", "value": "x"}]), "turn 0 is from 'system'; known"),
    "no role": (record(conversations=[{"value": "x"}]), "turn 0 is from None; known roles"),
    "gpt first": (record(conversations=turns("Red.", "<image>", first=1)), "turn 0 is from gpt, not human"),
    "human twice": (
        record(conversations=[*turns("<image>"), *turns("What?", "Red.")]),
        "turn 1 is from human, not gpt; turns alternate",
    ),
    "gpt twice": (
        record(conversations=[*turns("<image>", "Red."), *turns("Yes.", first=1)]),
        "turn 2 is from gpt, not human; turns alternate",
    ),
    "no answer": (record(conversations=turns("<image>")), "turn 0, the last, has no gpt answer"),
    "no last answer": (record(conversations=turns("<image>", "Red.", "Why?")), "turn 2, the last, has no"),
    "an empty answer": (record(conversations=turns("<image>", " \n")), "turn 1 is an empty answer"),
    "no <image>": (record(conversations=turns("What?", "Red.")), "it has 0 <image> in its turns"),
    "two <image>": (record(conversations=turns("<image><image>", "Red.")), "it has 2 <image> in its turns"),
    "<image> in two turns": (record(conversations=turns("<image>", "<image>")), "it has 2 <image> in"),
    "<image> later": (
        record(conversations=turns("What?", "Red.", "<image>", "Yes.")),
        "its <image> is in turn 2, not in the first",
    ),
    "half a character": (
        record(conversations=turns("<image>", "\ud83d")),
        "turn 1 holds \\ud83d, half of a character",
    ),
    "half a character in a path": (record(image="\udc80.png"), "the image's path holds \\udc80, half"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_an_error_or_skipped_with_its_reason(name: str, images: Path, tmp_path: Path) -> None:
    entry, reason = BAD[name]
    path = written(tmp_path, [record(), entry, record(id="last")])
    with pytest.raises(RecordError) as caught:
        read_records(path, images)
    message = str(caught.value)
    assert message.startswith(f"{path}: record 1")
    assert reason in message
    assert message.endswith("; correct the record, or leave such records out with --on_bad_record skip")
    assert "\n" not in message
    if isinstance(entry, dict) and entry.get("id") == "seven":
        assert "record 1 ('seven'): " in message

    good, skipped = read_records(path, images, "skip")
    assert [(each.number, each.name) for each in good] == [(0, "seven"), (2, "last")]
    ((number, why),) = skipped
    assert number == 1
    assert reason in why


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(60_000, 60_000, (b"IDAT", b"")), "has more than 100000000 pixels"),
        (png(10_001, 10_000, (b"IDAT", b"")), "has 10001 x 10000 pixels, more than 100000000"),
        (png(60_000, 60_000)[:33], "is damaged or none of BMP, GIF, JPEG, PNG, WEBP"),  # the header alone
        (b"no image", "is damaged or none of BMP, GIF, JPEG, PNG, WEBP"),
        (b"", "is damaged or none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is damaged or none of"),
    ],
)  # fmt: skip
def test_an_image_is_refused_by_its_header(data: bytes, reason: str, images: Path, tmp_path: Path) -> None:
    (images / "bad.png").write_bytes(data)
    path = written(tmp_path, [record(image="bad.png"), record()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            RecordError, match=r"train.json: record 0 \('seven'\): image 'bad.png' "
        ) as caught:
            read_records(path, images)
        assert reason in str(caught.value)
        good, skipped = read_records(path, images, "skip")
        assert [each.number for each in good] == [1]
        assert skipped[0][0] == 0
        assert reason in skipped[0][1]
        with pytest.raises(RecordError, match=r"bad.png: image of record 3 \('x'\): ") as caught:
            open_image(LlavaRecord(3, "x", Path("bad.png"), (), "g"), images)
    assert reason in str(caught.value)


def test_the_limit_is_ours_and_pillow_does_not_warn_below_it(images: Path, tmp_path: Path) -> None:
    (images / "large.png").write_bytes(png(10_000, 10_000, (b"IDAT", b"")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good, _ = read_records(written(tmp_path, [record(image="large.png")]), images)
    assert len(good) == 1


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.gif", "d.webp", "e.bmp"])
def test_an_image_is_decoded_in_rgb(name: str, images: Path, tmp_path: Path) -> None:
    ((good,), _) = read_records(written(tmp_path, [record(image=f"coco/{name}")]), images)
    image = open_image(good, images)
    (images / "coco" / name).unlink()  # it is loaded: nothing is read later
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert len(image.tobytes()) == 3 * 64 * 64
    with pytest.raises(
        RecordError, match=rf"{name}: image of record 0 \('seven'\): cannot be read .*No such file"
    ):
        open_image(good, images)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_kind_of_pixels_becomes_rgb(mode: str, images: Path, tmp_path: Path) -> None:
    Image.new(mode, (5, 4)).save(images / "mode.png")
    ((good,), _) = read_records(written(tmp_path, [record(image="mode.png")]), images)
    assert open_image(good, images).mode == "RGB"


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.gif", "d.webp", "e.bmp"])
def test_a_truncated_image_is_an_error_when_opened(name: str, images: Path, tmp_path: Path) -> None:
    file = images / "coco" / name
    ((good,), _) = read_records(written(tmp_path, [record(image=f"coco/{name}")]), images)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    if name != "d.webp":  # whose decoder reads the whole file first
        read_records(tmp_path / "train.json", images)
    with pytest.raises(RecordError) as caught:
        open_image(good, images)
    assert str(caught.value).startswith(f"{file}: image of record 0 ('seven'): ")
    assert str(caught.value).endswith("; replace the image, or remove the record from its JSON file")
    assert "\n" not in str(caught.value)


def test_damaged_data_is_an_error_when_opened(images: Path, tmp_path: Path) -> None:
    (images / "bad.png").write_bytes(png(64, 64, (b"IDAT", b"no zlib stream")))
    ((good,), _) = read_records(written(tmp_path, [record(image="bad.png")]), images)
    with pytest.raises(RecordError, match=r"bad.png: image of record 0 .* is truncated or damaged"):
        open_image(good, images)


def test_good_records_keep_their_numbers_and_groups(images: Path, tmp_path: Path) -> None:
    bad = without("image")
    path = written(tmp_path, [bad, record(), bad, bad, record(id=33, image="top.png", model="x"), bad])
    good, skipped = read_records(path, images, "skip")
    assert good == [
        LlavaRecord(1, "seven", Path("coco/a.png"), (("human", "<image>\nWhat?"), ("gpt", "Red.")), "coco"),
        LlavaRecord(4, "33", Path("top.png"), (("human", "<image>\nWhat?"), ("gpt", "Red.")), "train"),
    ]
    assert skipped == [(number, "it has no image") for number in (0, 2, 3, 5)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{}", "holds no list, but a dict; LLaVA's format is one JSON list of records"),
        (b"[]", "holds an empty list"),
        (b'[{"id": 1}\n{"id": 2}]', "malformed JSON: Expecting ',' delimiter at line 2, character 1"),
        (b'["\xff"]', "is not UTF-8 at byte 2"),
        (b"[" * 100_000, "is beyond Python's JSON parser"),
        (b"[" + b"1" * 5000 + b"]", "is beyond Python's JSON parser"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_an_error(
    data: bytes, reason: str, images: Path, tmp_path: Path
) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(data)
    for mode in ("error", "skip"):
        with pytest.raises(RecordError) as caught:
            read_records(path, images, mode)  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"{path}: {reason}")


def test_missing_files_and_folders_are_errors(images: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"none.json: No such file"):
        read_records(tmp_path / "none.json", images)
    with pytest.raises(RecordError, match=r"image folder .*/none: no such folder"):
        read_records(written(tmp_path, [record()]), tmp_path / "none")


def conversation(*texts: str) -> LlavaRecord:
    roles = ("human", "gpt")
    pairs = tuple((roles[position % 2], text) for position, text in enumerate(texts))
    return LlavaRecord(17, "seven", Path("a.png"), pairs, "train")


def encode(
    record: LlavaRecord, block_size: int, *, image_tokens: int = 3, begin_of_text: int | None = None
) -> tuple[list[int], list[int]]:
    x, y = encode_record(
        record,
        Letters(),
        block_size=block_size,
        image_tokens=image_tokens,
        image_token_id=PICTURE,
        end_of_text=END,
        begin_of_text=begin_of_text,
    )
    assert x.dtype == y.dtype == np.int64
    assert x.shape == y.shape == (block_size,)
    return x.tolist(), y.tolist()


def letters(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_the_targets_are_the_answers_and_their_ends() -> None:
    """Against rows made by hand: 1 + 6 + 3 + 13 ids of the first prompt, then the answer from position 23."""
    x, y = encode(conversation("<image>\nA?", "No.", "B?", "Yes"), 56, begin_of_text=BEGIN)
    prompt = [BEGIN, *letters("USER: "), PICTURE, PICTURE, PICTURE, *letters("\nA? ASSISTANT:")]
    second = letters("USER: B? ASSISTANT:")
    assert (len(prompt), len(second)) == (24, 19)
    row = [*prompt, *letters(" No."), END, *second, *letters(" Yes"), END]
    assert len(row) == 53
    assert x == [*row, END, END, END]
    expected = [IGNORED] * 56
    expected[23:28] = [ord(" "), ord("N"), ord("o"), ord("."), END]  # at each position, the id after it
    expected[47:52] = [ord(" "), ord("Y"), ord("e"), ord("s"), END]
    assert y == expected


def test_begin_of_text_is_optional() -> None:
    with_begin = encode(conversation("<image>\nA?", "No."), 40, begin_of_text=BEGIN)
    x, y = encode(conversation("<image>\nA?", "No."), 40)
    assert x == [*with_begin[0][1:], END]
    assert y == [*with_begin[1][1:], IGNORED]


@pytest.mark.parametrize("question", ["<image>\nA?", "A?\n<image>", "<image>A?", "A? <image> "])
def test_the_image_comes_before_the_question(question: str) -> None:
    assert encode(conversation(question, "No."), 40) == encode(conversation("<image>\nA?", "No."), 40)


def test_an_image_within_a_question_moves_to_its_front() -> None:
    assert encode(conversation("In <image> is?", "No."), 40) == encode(
        conversation("<image>\nIn  is?", "No."), 40
    )


def test_a_row_is_filled_to_the_last_position() -> None:
    """31 ids for 30 positions: the last target is the end of text after the last id of x."""
    it = conversation("<image>\nA?", "Green.")
    x, y = encode(it, 30)
    assert (x[-1], y[-1]) == (ord("."), END)
    assert y.count(END) == 1
    with pytest.raises(RecordError) as caught:
        encode(it, 29)
    assert str(caught.value) == (
        "record 17 ('seven'): has 31 tokens, 3 of them for the image, and a row of --block_size 29 takes 30; "
        "give --block_size 30 or larger"
    )


@pytest.mark.parametrize("tokenizer", ["gpt2_bytes"])
def test_a_tokenizer_of_the_repository_fits(tokenizer: str) -> None:
    made = get_tokenizer(tokenizer)
    x, y = encode_record(
        conversation("<image>\nA?", "Größe."),
        made,
        block_size=64,
        image_tokens=4,
        image_token_id=50257,
        end_of_text=50256,
    )
    assert made.decode(x[x < 50256].tolist()) == "USER: \nA? ASSISTANT: Größe."
    assert made.decode(y[y != IGNORED].tolist()) == " Größe.<|endoftext|>"
    assert np.flatnonzero(x == 50257).tolist() == [6, 7, 8, 9]


def test_an_answer_never_shares_a_token_with_its_prompt() -> None:
    seen: list[str] = []

    class Recorder(Letters):
        def encode(self, text: str) -> np.ndarray:
            seen.append(text)
            return super().encode(text)

    encode_record(
        conversation("<image>\nA?", "No.", "B?", "Yes"),
        Recorder(),
        block_size=64,
        image_tokens=1,
        image_token_id=PICTURE,
        end_of_text=END,
    )
    assert seen == ["USER: ", "\nA? ASSISTANT:", " No.", "USER: B? ASSISTANT:", " Yes"]


def test_an_image_id_in_the_text_is_an_error() -> None:
    with pytest.raises(
        RecordError, match=r"record 17 \('seven'\): id 63, .* is also in its text; choose an id"
    ):
        encode_record(
            conversation("<image>\nA?", "No."),
            Letters(),
            block_size=64,
            image_tokens=1,
            image_token_id=ord("?"),
            end_of_text=END,
        )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "new" / "demo"
    assert llava_demo.main(["--output_dir", str(folder)]) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]
    return folder


def test_every_record_of_the_demo_set_is_good(demo: Path) -> None:
    assert sorted(path.name for path in demo.iterdir()) == ["images", "test.json", "train.json", "val.json"]
    images: list[Path] = []
    for split, count in COUNTS.items():
        good, skipped = read_records(demo / f"{split}.json", demo / IMAGES)
        assert (len(good), skipped) == (count, [])
        assert {each.group for each in good} == {
            f"{colour}_{shape}" for colour in COLOURS for shape in SHAPES
        }
        for each in good:
            colour, shape = each.group.split("_")
            (_, question), (_, answer) = each.turns
            asked = question.removeprefix("<image>\n")
            assert answer == QUESTIONS[asked].format(colour=colour, shape=shape)
            assert open_image(each, demo / IMAGES).size == (64, 64)
        kinds = {(each.group, each.turns[0][1]) for each in good}
        assert len(kinds) == 12 * len(QUESTIONS)
        images += [each.image for each in good]
    assert len(set(images)) == len(images) == len(list((demo / IMAGES).rglob("*.png")))


def test_the_demo_set_is_the_same_each_time(demo: Path, tmp_path: Path) -> None:
    (tmp_path / ".again.tmp" / "images").mkdir(parents=True)  # what a killed run leaves
    (tmp_path / ".again.tmp" / "images" / "left.png").touch()
    make_demo(tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (demo, tmp_path / "again")
    )
    assert first == second


def test_the_second_time_there_is_nothing_to_do(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = tree(demo)
    with caplog.at_level("INFO"):
        make_demo(demo)
    assert tree(demo) == before
    assert caplog.messages == [f"the demo set in {demo} is complete: nothing to do"]


def _remove_image(folder: Path) -> str:
    next((folder / IMAGES / "red_square").iterdir()).unlink()
    return "has no images/red_square/"


def _change_records(folder: Path) -> str:
    (folder / "val.json").write_text("[]")
    return "holds another val.json"


def _remove_records(folder: Path) -> str:
    (folder / "test.json").unlink()
    return "has no test.json"


@pytest.mark.parametrize("damage", [_remove_image, _change_records, _remove_records])
def test_another_folder_is_an_error(damage: Callable[[Path], str], tmp_path: Path) -> None:
    make_demo(tmp_path / "demo")
    reason = damage(tmp_path / "demo")
    before = tree(tmp_path)
    with pytest.raises(DemoError, match=rf"demo: exists and {reason}.*; remove it, or choose another folder"):
        make_demo(tmp_path / "demo")
    assert tree(tmp_path) == before
    assert llava_demo.main(["--output_dir", str(tmp_path / "demo")]) == 1


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llava_demo, "draw_image", interrupted)
    assert llava_demo.main(["--output_dir", str(tmp_path / "demo")]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawing_has_its_colour_on_a_light_background(colour: str, shape: str) -> None:
    for seed in range(20):
        pixels = np.asarray(draw_image(colour, shape, Random(seed)))  # (64, 64, 3)
        assert pixels.shape == (64, 64, 3)
        drawn = (pixels == COLOURS[colour]).all(-1)
        assert pixels[~drawn].min() >= 200
        rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
        sides = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert min(sides) >= 16
        assert abs(int(sides[0]) - int(sides[1])) <= 1
        share = drawn.sum() / (int(sides[0]) * int(sides[1]))
        expected = {"square": 1.0, "circle": np.pi / 4, "triangle": 0.5}[shape]
        assert share == pytest.approx(expected, abs=0.06)


def test_the_formats_are_pillows() -> None:
    Image.init()
    assert set(llava_records.FORMATS) <= Image.OPEN.keys()
