"""Make a small corpus of real text from this Python installation, and its shards.

    python -m data_processing.demo_corpus --output_dir data/demo

It has four domains: the source code of Python's standard library, the documentation of the language and its
built-in modules, the metadata of the installed packages (mostly their READMEs), and their licences. The text
is written in the Pile's format to {output_dir}/jsonl and tokenized with gpt2_bytes. This takes a few seconds
and no network. An installation always gives the same corpus; other versions of Python or packages give
another one.
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
from data_processing.train_tokenizer import train_tokenizer
from foundation.arguments import ArgumentParser
from foundation.errors import UserError, file_errors
from foundation.files import remove, written_whole
from foundation.paths import path_argument

TOKENIZER = "gpt2_bytes"
DOMAIN_BYTES = 1_200_000  # limit for each domain: the corpus is a few megabytes
DOCUMENT_BYTES = 32_768  # limit for each document, so that none fills a split; longer ones are cut
HELD_OUT = 0.1  # share of a domain's bytes, for val and for test each
SPLIT_BYTES = 16_384  # least bytes of a domain in a split: 16 blocks of 1024
log = logging.getLogger(__name__)


class DemoError(UserError):
    """The installation has too little text, or the folder holds something else."""


def read_python_source() -> Iterator[str]:
    """Yield the modules of the standard library, except tests, tables and parts that distributions omit."""
    unwanted = {
        "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data",
        "__pycache__",
    }  # fmt: skip
    for folder, subfolders, files in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in unwanted]
        yield from _texts(Path(folder) / file for file in files if file.endswith(".py"))


def read_python_docs() -> Iterator[str]:
    """Yield the docstrings of the interpreter's built-in modules, and help()'s topics where installed."""
    for name in sys.builtin_module_names:
        for member in vars(importlib.import_module(name)).values():
            if inspect.isclass(member) or inspect.isbuiltin(member):
                yield _docstrings(member)
    if importlib.util.find_spec("pydoc_data.topics") is not None:
        yield from importlib.import_module("pydoc_data.topics").topics.values()
    else:
        log.info("Python Docs: without the topics of help(), which are not installed here")


def _docstrings(member: object) -> str:
    """Return a function's docstring, or those of a class and of its own methods and attributes."""
    parts = [inspect.getdoc(member) or ""]
    if inspect.isclass(member):
        for name, attribute in sorted(vars(member).items()):
            if inspect.isroutine(attribute) or inspect.isdatadescriptor(attribute):
                parts.append(f"{member.__name__}.{name}\n{inspect.getdoc(attribute) or ''}")
    return "\n\n".join(parts)


def read_package_metadata() -> Iterator[str]:
    """Yield the METADATA of each installed package."""
    return _texts(path for path in _package_files() if path.name == "METADATA")


def read_licences() -> Iterator[str]:
    """Yield the licence files of each installed package."""
    words = ("license", "licence", "copying", "notice")
    return _texts(path for path in _package_files() if any(word in path.name.lower() for word in words))


def _package_files() -> Iterator[Path]:
    """Yield the files in the .dist-info folder of each installed package, as the installer recorded them."""
    for package in importlib.metadata.distributions():
        for file in package.files or []:
            if file.parts[0].endswith(".dist-info"):
                yield Path(str(package.locate_file(file)))


def _texts(paths: Iterator[Path]) -> Iterator[str]:
    for path in paths:
        if not path.is_file():  # recorded, but removed since
            continue
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            log.info("left out, because it is not UTF-8: %s", path)


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "Licences": read_licences,
    "Package Metadata": read_package_metadata,
    "Python Docs": read_python_docs,
    "Python Source": read_python_source,
}


def choose_documents(texts: Iterator[str]) -> list[str]:
    """Return distinct documents of at most DOCUMENT_BYTES, at most DOMAIN_BYTES in all.

    They are sorted by hash, so their order does not depend on where and in which order they were found.
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
    """Return the first whole lines of a text, at most DOCUMENT_BYTES."""
    data = text.encode("utf-8", errors="replace")
    if len(data) <= DOCUMENT_BYTES:
        return data.decode("utf-8")
    beginning, newline, _ = data[:DOCUMENT_BYTES].rpartition(b"\n")
    return (beginning + newline or data[:DOCUMENT_BYTES]).decode("utf-8", errors="ignore")


def deal_documents(domain: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """Divide a domain's documents among the splits. val and test get HELD_OUT of the bytes each.

    Raises:
        DemoError: a split gets less than SPLIT_BYTES.
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
    """Write {folder}/{train,val,test}.jsonl, all or none of them."""
    partial = folder.with_name(folder.name + ".partial")
    remove(partial)
    with written_whole(folder, partial):
        partial.mkdir(parents=True)
        for domain, texts in DOMAINS.items():
            for split, dealt in deal_documents(domain, choose_documents(texts())).items():
                with (partial / f"{split}.jsonl").open("a", encoding="utf-8") as file:
                    for text in dealt:
                        file.write(json.dumps({"text": text, "meta": {"pile_set_name": domain}}) + "\n")


def is_complete(output_dir: Path) -> bool:
    """Return whether all shards exist.

    Raises:
        DemoError: they are not of the demo corpus.
        ShardError: they are damaged.
    """
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


def make_demo(output_dir: Path, vocabulary: int | None = None) -> None:
    """Make the corpus and its shards, or resume after an interruption. Does nothing if all shards exist.

    Args:
        vocabulary: the number of ids of a byte-level BPE tokenizer that is trained on the corpus and makes the
            shards; None: each byte is a token.
    """
    if is_complete(output_dir):
        log.info("the demo corpus in %s is complete: nothing to do", output_dir)
        return
    corpus = output_dir / "jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    tokenizer = TOKENIZER
    if vocabulary is not None:
        train_tokenizer([corpus / "train.jsonl"], vocabulary, output_dir / "tokenizer")
        tokenizer = str(output_dir / "tokenizer")
    for split in SPLITS:
        tokenize(
            [corpus / f"{split}.jsonl"],
            split=split,
            output_dir=output_dir,
            tokenizer=tokenizer,
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
    parser.add_argument(
        "--vocabulary",
        type=int,
        help="train a byte-level BPE tokenizer of so many ids on the corpus (default: each byte is a token)",
    )
    arguments = parser.parse_args(argv)
    try:
        with file_errors(f"--output_dir {arguments.output_dir}", DemoError):
            make_demo(arguments.output_dir, arguments.vocabulary)
    except UserError as error:
        log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted; the same command resumes from there")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
