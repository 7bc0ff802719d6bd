"""Draw a small set of images with questions and answers, in LLaVA's format.

    python -m data_processing.llava_demo --output_dir data/llava_demo

Each image is one coloured shape on a light noisy background, 64 x 64. {output_dir}/{train,val,test}.json are
the records, {output_dir}/images the images, in a folder for each colour and shape. This takes seconds and no
network. The records are always the same, and so are the pixels with one version of Pillow.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

from data_processing.demo_corpus import DemoError
from data_processing.llava_records import IMAGE
from foundation.arguments import ArgumentParser
from foundation.errors import UserError, file_errors
from foundation.files import remove, written_whole
from foundation.paths import path_argument

SIZE = 64  # pixels, width and height
COUNTS = {"train": 400, "val": 60, "test": 60}  # images of each split
COLOURS = {"red": (210, 30, 30), "green": (30, 150, 50), "blue": (40, 70, 210), "yellow": (240, 200, 0)}
SHAPES = ("square", "circle", "triangle")
QUESTIONS = {
    "What colour is the shape?": "It is {colour}.",
    "What shape is this?": "It is a {shape}.",
    "Describe the image.": "A {colour} {shape}.",
}
IMAGES = "images"  # the folder that the records' image paths start in
_LIGHT = bytes(200 + byte * 56 // 256 for byte in range(256))  # random bytes -> the background's
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """What one image shows, and what is asked about it."""

    split: str
    number: int  # counted over all splits: the image's file name
    colour: str
    shape: str
    question: str

    @property
    def image(self) -> str:
        """Path in IMAGES."""
        return f"{self.colour}_{self.shape}/{self.number:03d}.png"

    def as_record(self) -> dict[str, Any]:
        answer = QUESTIONS[self.question].format(colour=self.colour, shape=self.shape)
        return {
            "id": f"{self.split}_{self.number:03d}",
            "image": self.image,
            "conversations": [
                {"from": "human", "value": f"{IMAGE}\n{self.question}"},
                {"from": "gpt", "value": answer},
            ],
        }


def draw_image(colour: str, shape: str, random: Random) -> Image.Image:
    """Draw a shape of random size and place on a light noisy background, RGB of SIZE x SIZE.

    Args:
        colour: one of COLOURS.
        shape: one of SHAPES.
    """
    image = Image.frombytes("RGB", (SIZE, SIZE), random.randbytes(3 * SIZE * SIZE).translate(_LIGHT))
    side = random.randint(SIZE // 4, SIZE * 5 // 8)
    left, top = random.randint(0, SIZE - 1 - side), random.randint(0, SIZE - 1 - side)
    right, bottom = left + side, top + side
    draw, fill = ImageDraw.Draw(image), COLOURS[colour]
    if shape == "square":
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    else:
        assert shape == "triangle", shape
        draw.polygon([((left + right) // 2, top), (left, bottom), (right, bottom)], fill=fill)
    return image


def list_drawings() -> Iterator[Drawing]:
    """Yield all drawings of the set. Each split has each colour, shape and question about equally often."""
    kinds = list(product(COLOURS, SHAPES))
    questions = list(QUESTIONS)
    number = 0
    for split, count in COUNTS.items():
        for position in range(count):
            rounds, kind = divmod(position, len(kinds))
            # Every kind gets every question in three rounds, and every round has all questions.
            question = questions[(rounds + kind) % len(questions)]
            yield Drawing(split, number, *kinds[kind], question)
            number += 1


def record_files() -> dict[str, str]:
    """Return the JSON files of the set: name -> text."""
    records: dict[str, list[dict[str, Any]]] = {split: [] for split in COUNTS}
    for drawing in list_drawings():
        records[drawing.split].append(drawing.as_record())
    return {f"{split}.json": json.dumps(content, indent=1) + "\n" for split, content in records.items()}


def write_demo(output_dir: Path) -> None:
    """Write the set, all or nothing of it. `output_dir` must not exist."""
    hidden = output_dir.with_name(f".{output_dir.name}.tmp")
    remove(hidden)  # what a killed run left
    with written_whole(output_dir, hidden):
        hidden.mkdir(parents=True)
        for name, text in record_files().items():
            (hidden / name).write_text(text, encoding="utf-8")
        for drawing in list_drawings():
            path = hidden / IMAGES / drawing.image
            path.parent.mkdir(parents=True, exist_ok=True)
            image = draw_image(drawing.colour, drawing.shape, Random(f"llava_demo {drawing.number}"))
            image.save(path)


def check_complete(output_dir: Path) -> None:
    """Raise DemoError if an existing folder is not the whole set."""
    files = record_files()
    names = [*files, *(f"{IMAGES}/{drawing.image}" for drawing in list_drawings())]
    problems = [f"has no {name}" for name in names if not (output_dir / name).is_file()] or [
        f"holds another {name}" for name in files if (output_dir / name).read_bytes() != files[name].encode()
    ]
    if problems:
        raise DemoError(
            f"--output_dir {output_dir}: exists and {problems[0]}, so it is not the demo set; "
            "remove it, or choose another folder"
        )


def make_demo(output_dir: Path) -> None:
    """Make the set. Does nothing if it is complete.

    Raises:
        DemoError: the folder exists and is not the whole set.
    """
    if output_dir.exists():
        check_complete(output_dir)
        log.info("the demo set in %s is complete: nothing to do", output_dir)
        return
    write_demo(output_dir)
    log.info("wrote %d images and their records to %s", sum(COUNTS.values()), output_dir)


def main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = ArgumentParser(
        prog="python -m data_processing.llava_demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_dir", type=path_argument, required=True, help="the folder for records and images"
    )
    arguments = parser.parse_args(argv)
    try:
        with file_errors(f"--output_dir {arguments.output_dir}", DemoError):
            make_demo(arguments.output_dir)
    except UserError as error:
        log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted; nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
