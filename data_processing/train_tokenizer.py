"""Train a byte-level BPE tokenizer on records of Pile's format.

    python -m data_processing.train_tokenizer --input FILES --vocabulary 4096 --output_dir FOLDER

It is written as tokenizer.json, with a tokenizer_config.json that names <|endoftext|> as the end of a text. The same
input gives the same file.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_processing.input_files import InputFile, PileError, find_inputs
from data_processing.pile_records import BadRecord, number_lines, parse_record, read_line_batches
from data_processing.shards import write_json_atomically
from data_processing.tokenizer_files import FILE, SETTINGS
from foundation.arguments import ArgumentParser
from foundation.errors import UserError, file_errors
from foundation.files import write_text
from foundation.paths import path_argument

END = "<|endoftext|>"
log = logging.getLogger(__name__)


def texts_of(sources: Sequence[InputFile]) -> Iterator[str]:
    """Yield the text of each record. Raises PileError for a line that is none."""
    for source in sources:
        for batch in read_line_batches(source):
            for number, line in number_lines(batch):
                try:
                    yield parse_record(line)[0]
                except BadRecord as error:
                    raise PileError(f"{source.path}:{number}: {error}. Correct or remove the line") from error


def train_tokenizer(inputs: Sequence[Path], vocabulary: int, output_dir: Path) -> Path:
    """Train a tokenizer with this many ids, END among them, and return its file.

    Raises:
        UserError: the vocabulary is too small, or too large for the input; the input is bad, or the folder
            cannot be written.
    """
    if vocabulary < 257:
        raise UserError(f"--vocabulary {vocabulary}: at least 257, the 256 bytes and {END}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts_of(find_inputs(inputs)), trainer)
    made = tokenizer.get_vocab_size()
    if made < vocabulary:
        raise UserError(
            f"--vocabulary {vocabulary}: the input gives only {made} ids; choose fewer, or add text"
        )
    path = output_dir / FILE
    with file_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json_atomically(
            output_dir / SETTINGS[0], {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
        )
        write_text(path, tokenizer.to_str(pretty=True), path.with_name(f".{FILE}.tmp"))
    log.info("%s: %d ids", path, made)
    return path


def main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = ArgumentParser(
        prog="python -m data_processing.train_tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input", type=path_argument, nargs="+", required=True, help="files or folders of records"
    )
    parser.add_argument("--vocabulary", type=int, required=True, help="number of ids")
    parser.add_argument("--output_dir", type=path_argument, required=True, help="folder of the tokenizer")
    arguments = parser.parse_args(argv)
    try:
        train_tokenizer(arguments.input, arguments.vocabulary, arguments.output_dir)
    except UserError as error:
        log.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
