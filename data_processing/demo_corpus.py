"""A small corpus of real text that every machine has that can run this project, and its shards.

    python -m data_processing.demo_corpus --output_dir data/demo

Four domains: the source code of Python's standard library, the documentation of the language and its
built-in modules, the metadata of the installed packages (mostly their READMEs), and their licences. It is
written in the Pile's format to {output_dir}/jsonl, then made into shards with the tokenizer gpt2_bytes: no
network, a few seconds. One installation always gives the same corpus; another version of Python, another one.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_processing.shards import list_shards
from data_processing.split_parts import MANIFEST
from data_processing.tokenize_pile import SPLITS, tokenize
from foundation.arguments import ArgumentParser
from foundation.errors import UserError, file_errors
from foundation.files import remove, written_whole
from foundation.paths import path_argument

TOKENIZER = "gpt2_bytes"
DOMAIN_BYTES = 1_200_000  # at most, so that the corpus is a few megabytes
DOCUMENT_BYTES = 32_768  # at most, the beginning of longer ones: no document shall fill a split
HELD_OUT = 0.1  # of a domain's bytes, for val and for test each
SPLIT_BYTES = 16_384  # at least, of each domain: 16 blocks of 1024 for validation rows and evaluation
log = logging.getLogger(__name__)


class DemoError(UserError):
    """This installation has too little text, or the folder holds something else."""


def python_source() -> Iterator[str]:
    """The standard library's modules, but tests, tables and what distributions often leave out."""
    unwanted = {
        "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data",
        "__pycache__",
    }  # fmt: skip
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in unwanted]
        yield from _texts(Path(folder) / file for file in files if file.endswith(".py"))


def python_docs() -> Iterator[str]:
    """The docstrings of the modules built into the interpreter, and help()'s topics where installed."""
    for name in sys.builtin_module_names:
        for member in vars(importlib.import_module(name)).values():
            if inspect.isclass(member) or inspect.isbuiltin(member):
                yield _docstrings(member)
    if importlib.util.find_spec("pydoc_data.topics") is not None:
        yield from importlib.import_module("pydoc_data.topics").topics.values()
    else:
        log.info("Python Docs: without the topics of help(), which are not installed here")


def _docstrings(member: object) -> str:
    """The docstring of a function, or those of a class and its own methods and attributes."""
    parts = [inspect.getdoc(member) or ""]
    if inspect.isclass(member):
        for name, attribute in sorted(vars(member).items()):
            if inspect.isroutine(attribute) or inspect.isdatadescriptor(attribute):
                parts.append(f"{member.__name__}.{name}\n{inspect.getdoc(attribute) or ''}")
    return "\n\n".join(parts)


def package_metadata() -> Iterator[str]:
    """METADATA of each installed package."""
    return _texts(path for path in _package_files() if path.name == "METADATA")


def licences() -> Iterator[str]:
    """The licence files of each installed package."""
    words = ("license", "licence", "copying", "notice")
    return _texts(path for path in _package_files() if any(word in path.name.lower() for word in words))


def _package_files() -> Iterator[Path]:
    """The files about (not of) each installed package, as its installer recorded them."""
    for package in importlib.metadata.distributions():
        for file in package.files or []:
            if file.parts[0].endswith(".dist-info"):
                yield Path(str(package.locate_file(file)))


def _texts(paths: Iterator[Path]) -> Iterator[str]:
    for path in paths:
        if not path.is_file():  # recorded, and removed since
            continue
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            log.info("left out, because it is not UTF-8: %s", path)


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "Licences": licences,
    "Package Metadata": package_metadata,
    "Python Docs": python_docs,
    "Python Source": python_source,
}


def documents(texts: Iterator[str]) -> list[str]:
    """Distinct documents of at most DOCUMENT_BYTES, DOMAIN_BYTES in all, in the order of their hashes.

    That order does not depend on where and in which order the texts were found.
    """
    distinct = {
        hashlib.sha256(text.encode()).digest(): text for text in map(_beginning, texts) if text.strip()
    }
    kept, size = [], 0
    for _, text in sorted(distinct.items()):
        size += len(text.encode())
        if size > DOMAIN_BYTES:
            break
        kept.append(text)
    return kept


def _beginning(text: str) -> str:
    """Whole lines of at most DOCUMENT_BYTES."""
    data = text.encode("utf-8", errors="replace")
    if len(data) <= DOCUMENT_BYTES:
        return data.decode("utf-8")
    beginning, newline, _ = data[:DOCUMENT_BYTES].rpartition(b"\n")
    return (beginning + newline or data[:DOCUMENT_BYTES]).decode("utf-8", errors="ignore")


def deal(domain: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """Splits a domain by document: val and test get HELD_OUT of the bytes each, train the rest.

    Raises DemoError if a split gets less than SPLIT_BYTES.
    """
    total = sum(len(text.encode()) for text in texts)
    share = max(HELD_OUT * total, SPLIT_BYTES)
    dealt: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for text in texts:
        split = next((held_out for held_out in ("val", "test") if sizes[held_out] < share), "train")
        dealt[split].append(text)
        sizes[split] += len(text.encode())
    if min(sizes.values()) < SPLIT_BYTES:
        raise DemoError(
            f"domain {domain!r}: this installation of Python ({sys.prefix}) has {total} bytes of text for "
            "it, too few for three splits. Use a full installation and the environment that ./init.sh makes, "
            "or your own data with python -m data_processing.tokenize_pile"
        )
    return dealt


def write_corpus(folder: Path) -> None:
    """Writes {folder}/{train,val,test}.jsonl, all or none of them."""
    partial = folder.with_name(folder.name + ".partial")
    remove(partial)
    with written_whole(folder, partial):
        partial.mkdir(parents=True)
        for domain, texts in DOMAINS.items():
            for split, dealt in deal(domain, documents(texts())).items():
                with (partial / f"{split}.jsonl").open("a", encoding="utf-8") as file:
                    for text in dealt:
                        file.write(json.dumps({"text": text, "meta": {"pile_set_name": domain}}) + "\n")


def is_complete(output_dir: Path) -> bool:
    """Whether all shards are there. DemoError if they are of something else, ShardError if damaged."""
    if not all((output_dir / split / MANIFEST).is_file() for split in SPLITS):
        return False
    for split in SPLITS:
        found = [shard.domain for shard in list_shards(output_dir, split)]
        if found != list(DOMAINS):
            raise DemoError(
                f"--output_dir {output_dir}: holds shards of {', '.join(found)}, not of the demo corpus; "
                "choose another folder"
            )
    return True


def make_demo(output_dir: Path) -> None:
    """Makes the corpus and its shards; goes on after an interruption; does nothing if all is there."""
    if is_complete(output_dir):
        log.info("the demo corpus in %s is complete: nothing to do", output_dir)
        return
    corpus = output_dir / "jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    for split in SPLITS:
        tokenize(
            [corpus / f"{split}.jsonl"],
            split=split,
            output_dir=output_dir,
            tokenizer=TOKENIZER,
            num_workers=1,
        )


def main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = ArgumentParser(
        prog="python -m data_processing.demo_corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_dir", type=path_argument, required=True, help="the folder for corpus and shards"
    )
    arguments = parser.parse_args(argv)
    try:
        with file_errors(f"--output_dir {arguments.output_dir}", DemoError):
            make_demo(arguments.output_dir)
    except UserError as error:
        log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted; the same command goes on from there")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
