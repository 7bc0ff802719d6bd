"""TRL's packing of several samples into a row, with the samples known."""

from collections.abc import Callable
from copy import copy
from typing import Any

from foundation.errors import UserError

from .sample_ids import ROW


def packed_with_rows(
    prepare: Callable[..., Any], dataset: Any, processing: Any, args: Any, *more: Any
) -> Any:
    """Return the packed dataset that SFTTrainer makes, with one more column: for each token its sample's ROW.

    SFTTrainer keeps no other columns than its own. So this lets it tokenise without packing, then shuffles and packs
    with TRL's own function, as it does. Samples are cut to the row's length there, and not before.

    Args:
        prepare: SFTTrainer._prepare_dataset; more: its other arguments.
    """
    from trl.data_utils import pack_dataset

    plain = copy(args)
    plain.max_length, plain.shuffle_dataset = None, False
    tokenised = prepare(dataset, processing, plain, False, *more)
    described = {"desc": "Packing train dataset", "num_proc": args.dataset_num_proc}
    if args.pad_to_multiple_of is not None:
        raise UserError(
            "packed rows with pad_to_multiple_of: what pads a row would look like samples of one token"
        )
    rows = tokenised.map(
        lambda row: {ROW: [row[ROW]] * len(row["input_ids"])}, num_proc=args.dataset_num_proc
    ).select_columns(["input_ids", "labels", ROW])
    if args.shuffle_dataset:
        rows = rows.shuffle(seed=args.seed)
    packed = pack_dataset(rows, args.max_length, args.packing_strategy, described)
    return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed, tokenised
