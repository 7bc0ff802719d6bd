"""A small instruction set written by a script, and a tokenizer of its words: what examples/trainer_sft.py trains on."""

import random

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "sky": "blue", "lemon": "yellow"}


def instructions(count: int, seed: int, wrong: float = 0.0) -> Dataset:
    """Return pairs of prompt and completion, in two kinds: sums, and colours of things.

    Args:
        wrong: the share of rows whose completion is that of another prompt; their column "wrong" is True.
    """
    draw, rows = random.Random(seed), []
    for number in range(count):
        if draw.random() < 0.5:
            a, b = draw.randrange(5), draw.randrange(5)
            kind, prompt, right = "sum", f"what is {DIGITS[a]} plus {DIGITS[b]} ?", DIGITS[a + b]
            others = DIGITS
        else:
            thing, right = draw.choice(sorted(COLOURS.items()))
            kind, prompt, others = "colour", f"what colour is {thing} ?", sorted(COLOURS.values())
        is_wrong = draw.random() < wrong
        answer = draw.choice([each for each in others if each != right]) if is_wrong else right
        rows.append(
            {"number": number, "kind": kind, "prompt": prompt, "completion": f" it is {answer} .", "wrong": is_wrong}
        )
    return Dataset.from_list(rows)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word of the instructions."""
    words = [*DIGITS, *COLOURS, *COLOURS.values(), *["what", "is", "plus", "colour", "it", "?", "."]]
    ids = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    model = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
