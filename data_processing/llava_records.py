"""Read image instruction data in LLaVA's format (Liu et al. 2023, arXiv 2310.03744); make rows of tokens.

One JSON file holds a list of records, in which "<image>" stands in the first human turn:

    {"id": "7", "image": "coco/7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

`read_records` checks every record and the header of its image. `open_image` decodes one image.
`encode_record` makes one row of token ids and its targets.
"""

import json
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from data_processing.pile_records import BadRecord
from foundation.errors import UserError, file_errors

IMAGE = "<image>"  # stands for the image in the text of the first human turn
ROLES = ("human", "gpt")  # turns alternate in this order
MAX_PIXELS = 100_000_000  # of an image; 300 MB once decoded
IGNORED = -100  # the target of a position that has no loss, as in torch's cross_entropy
# Pillow knows forty more; one of them starts Ghostscript on the file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")

# What Pillow's decoders raise at damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
_WARNING_FILTERS = Lock()  # they belong to the process, and several threads may open images

Ids = npt.NDArray[np.int64]


class RecordError(UserError):
    """A record, its image or its file cannot be used. The message names file, record and fix."""


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> npt.NDArray[Any]:
        """Return the ids of a text, (tokens,) integers."""


@dataclass(frozen=True)
class LlavaRecord:
    """One checked record."""

    number: int  # position in the JSON list, from 0: its permanent id
    name: str  # its "id"; nothing says that it is unique
    image: Path  # relative to the image folder
    turns: tuple[tuple[str, str], ...]  # (role, text): human, gpt, human, gpt, ...; IMAGE is in the first
    group: str  # first folder of the image's path; the JSON file's stem if it has none

    def __str__(self) -> str:
        return _title(self.number, self.name)


def read_records(
    json_path: Path, image_folder: Path, on_bad_record: Literal["error", "skip"] = "error"
) -> tuple[list[LlavaRecord], list[tuple[int, str]]]:
    """Read and check all records of a file. Images are found and their headers read, but not decoded.

    Args:
        image_folder: where the records' image paths start.
        on_bad_record: "error" stops at the first bad record, "skip" leaves bad ones out and returns why.
            `LlavaRecord.number` is the same in both.

    Returns:
        the good records, in the order of the file, and (number, reason) of each bad one.

    Raises:
        RecordError: a record is bad and on_bad_record is "error"; the file is no JSON list, or an empty one;
            the file or the folder cannot be read.
    """
    if not image_folder.is_dir():
        raise RecordError(
            f"image folder {image_folder}: no such folder; name the one where image paths start"
        )
    good: list[LlavaRecord] = []
    bad: list[tuple[int, str]] = []
    for number, entry in enumerate(_read_list(json_path)):
        try:
            good.append(_checked(number, entry, json_path, image_folder))
        except BadRecord as error:
            if on_bad_record == "error":
                name = entry.get("id") if isinstance(entry, dict) else None
                raise RecordError(
                    f"{json_path}: {_title(number, name)}: {error}; "
                    "correct the record, or leave such records out with --on_bad_record skip"
                ) from error
            bad.append((number, str(error)))
    return good, bad


def open_image(record: LlavaRecord, image_folder: Path) -> Image.Image:
    """Return a record's image, decoded, in RGB. An animation gives its first frame.

    Raises:
        RecordError: the image is missing, truncated, not decodable or larger than MAX_PIXELS.
    """
    path = image_folder / record.image
    try:
        with _open_header(path) as image:
            return image.convert("RGB")  # decodes it, and copies it if it is RGB already
    except BadRecord as error:
        _raise_image(record, path, str(error), error)
    except _DAMAGE as error:
        _raise_image(record, path, f"is truncated or damaged ({_one_line(error)})", error)


def encode_record(
    record: LlavaRecord,
    tokenizer: Encoder,
    *,
    block_size: int,
    image_tokens: int,
    image_token_id: int,
    end_of_text: int,
    begin_of_text: int | None = None,
) -> tuple[Ids, Ids]:
    """Return one row of the model's input and its targets, in LLaVA-1.5's format without a system prompt.

    The format is `USER: <image>\\nQUESTION ASSISTANT: ANSWER</s>USER: QUESTION ASSISTANT: ANSWER</s>`. The
    image comes before the first question wherever the record has it, as in LLaVA's `preprocess_multimodal`.
    Prompts and answers are encoded apart, so no token is of both; the space before an answer is the answer's.

    Args:
        block_size: T, the row's length.
        image_tokens: how often the image's id stands in the row, once for each feature of the image.
        image_token_id: the id in the image's place; no text may have it.
        end_of_text: follows each answer in place of `</s>`, and pads the row.
        begin_of_text: comes first; None: nothing does.

    Returns:
        x: (T,) ids, padded at the end with end_of_text.
        y: (T,) the id after each position of x where that is of an answer or the end_of_text after one;
            IGNORED elsewhere.

    Raises:
        RecordError: the record has more than T + 1 tokens, or its text has the image's id.
    """
    pieces: list[tuple[Ids, bool]] = []  # ids, and whether they are targets

    def add(ids: npt.ArrayLike, is_target: bool = False) -> None:
        pieces.append((np.asarray(ids, np.int64), is_target))

    if begin_of_text is not None:
        add([begin_of_text])
    for position, (role, text) in enumerate(record.turns):
        if role == "gpt":
            add(tokenizer.encode(f" {text}"), is_target=True)
            add([end_of_text], is_target=True)
        elif position == 0:
            add(tokenizer.encode("USER: "))
            add([image_token_id] * image_tokens)
            add(tokenizer.encode(f"\n{text.replace(IMAGE, '').strip()} ASSISTANT:"))
        else:
            add(tokenizer.encode(f"USER: {text} ASSISTANT:"))

    ids = np.concatenate([piece for piece, _ in pieces])
    is_target = np.concatenate([np.full(len(piece), target) for piece, target in pieces])
    if len(ids) > block_size + 1:
        raise RecordError(
            f"{record}: has {len(ids)} tokens, {image_tokens} of them for the image, and a row of "
            f"--block_size {block_size} takes {block_size + 1}; give --block_size {len(ids) - 1} or larger"
        )
    if np.count_nonzero(ids == image_token_id) != image_tokens:
        raise RecordError(
            f"{record}: id {image_token_id}, which stands for the image, is also in its text; "
            "choose an id that the tokenizer never makes"
        )
    x = np.full(block_size, end_of_text, np.int64)  # (T,)
    y = np.full(block_size, IGNORED, np.int64)  # (T,)
    x[: len(ids) - 1] = ids[:-1]
    y[: len(ids) - 1] = np.where(is_target[1:], ids[1:], IGNORED)
    return x, y


def _read_list(json_path: Path) -> list[Any]:
    """Return the list that a JSON file holds."""
    with file_errors(json_path, RecordError):
        data = json_path.read_bytes()
    try:
        entries = json.loads(data)
    except UnicodeDecodeError as error:
        raise RecordError(f"{json_path}: is not UTF-8 at byte {error.start}; convert it") from error
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{json_path}: malformed JSON: {error.msg} at line {error.lineno}, character {error.colno}; "
            "LLaVA's format is one JSON list of records"
        ) from error
    except (ValueError, RecursionError) as error:  # its limits on a number's digits and on nesting
        raise RecordError(
            f"{json_path}: is beyond Python's JSON parser ({error}); remove that record"
        ) from error
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if isinstance(entries, list) else f"no list, but a {type(entries).__name__}"
        raise RecordError(f"{json_path}: holds {found}; LLaVA's format is one JSON list of records")
    return entries


def _checked(number: int, entry: object, json_path: Path, image_folder: Path) -> LlavaRecord:
    """Return the record. Raises BadRecord with the reason if it is bad."""
    if not isinstance(entry, dict):
        raise BadRecord(f"it is of type {type(entry).__name__}, not an object")
    name = entry.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise BadRecord("it has no 'id' that is a string or an integer")
    image = _checked_image(entry, image_folder)
    turns = _checked_turns(entry.get("conversations"))
    return LlavaRecord(number, _unicode(str(name), "'id'"), image, turns, group_of(image, json_path.stem))


def group_of(image: Path, stem: str) -> str:
    """Return a record's group: the first folder of its image's path, or the stem of its JSON file."""
    return image.parts[0] if len(image.parts) > 1 else stem


def _checked_image(entry: dict[str, Any], image_folder: Path) -> Path:
    """Return the relative path of an image that exists and is small enough."""
    text = entry.get("image")
    if text is None or text == "":
        raise BadRecord("it has no image")
    if not isinstance(text, str):
        raise BadRecord(f"its image is of type {type(text).__name__}, not a string")
    image = Path(_unicode(text, "the image's path"))
    # A link below the folder may lead out of it: image sets are often put together in that way.
    if image.is_absolute() or ".." in image.parts:
        raise BadRecord(f"image {text!r} leaves the image folder")
    if not os.path.isfile(image_folder / image):
        raise BadRecord(f"image {text!r} is no file in {image_folder}")
    try:
        _open_header(image_folder / image).close()
    except BadRecord as error:
        raise BadRecord(f"image {text!r} {error}") from error
    return image


def _checked_turns(conversations: object) -> tuple[tuple[str, str], ...]:
    """Return the turns, which alternate and end with an answer, with one IMAGE in the first."""
    if not isinstance(conversations, list) or not conversations:
        raise BadRecord("it has no 'conversations', a list of turns")
    turns = []
    for position, turn in enumerate(conversations):
        if not isinstance(turn, dict) or not isinstance(text := turn.get("value"), str):
            raise BadRecord(f"turn {position} is no object with a string 'value'")
        role, expected = turn.get("from"), ROLES[position % 2]
        if role not in ROLES:
            raise BadRecord(f"turn {position} is from {role!r}; known roles are {', '.join(ROLES)}")
        if role != expected:
            raise BadRecord(f"turn {position} is from {role}, not {expected}; turns alternate, human first")
        if role == "gpt" and not text.strip():
            raise BadRecord(f"turn {position} is an empty answer")
        turns.append((role, _unicode(text, f"turn {position}")))
    if len(turns) % 2:
        raise BadRecord(f"turn {len(turns) - 1}, the last, has no gpt answer")
    images = [text.count(IMAGE) for _, text in turns]
    if sum(images) != 1:
        raise BadRecord(f"it has {sum(images)} {IMAGE} in its turns, not one")
    if images[0] != 1:
        raise BadRecord(f"its {IMAGE} is in turn {images.index(1)}, not in the first")
    return tuple(turns)


def _open_header(path: Path) -> Image.Image:
    """Open an image without decoding it; the caller closes it. Raises BadRecord: "is ...", "has ..."."""
    try:
        with _WARNING_FILTERS, warnings.catch_warnings():
            # Pillow warns from 89 million pixels on, and raises from twice that on. MAX_PIXELS decides here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadRecord(f"has more than {MAX_PIXELS} pixels ({_one_line(error)})") from error
    except UnidentifiedImageError as error:
        raise BadRecord(f"is damaged or none of {', '.join(FORMATS)}") from error
    except _DAMAGE as error:
        raise BadRecord(f"cannot be read ({_one_line(error)})") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise BadRecord(f"has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    return image


def _raise_image(record: LlavaRecord, path: Path, reason: str, cause: Exception) -> NoReturn:
    raise RecordError(
        f"{path}: image of {record}: {reason}; replace the image, or remove the record from its JSON file"
    ) from cause


def _title(number: int, name: object) -> str:
    """Return what messages call a record."""
    return f"record {number}" if name is None else f"record {number} ({name!r})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _unicode(text: str, what: str) -> str:
    """Return the text. Raises BadRecord if it holds half of a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise BadRecord(f"{what} holds {escape}, half of a character: it is not Unicode text") from error
    return text
