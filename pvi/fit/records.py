"""What is recorded in a step: names, and their numbers in one tensor."""

import torch
from torch import Tensor

Record = tuple[tuple[str, ...], Tensor]


def mean_of(records: list[Record]) -> Record:
    """Entry by entry over batches, of the entries that all have.

    Args:
        records: one for each batch.
    """
    if len(records) == 1:
        return records[0]
    names = tuple(n for n in records[0][0] if all(n in others for others, _ in records))
    return names, torch.stack([in_order(record, names) for record in records]).mean(0)


def in_order(record: Record, names: tuple[str, ...]) -> Tensor:
    """The entries of these names, NaN where there is none.

    Args:
        record: of one step.
        names: the entries wanted.
    """
    own, numbers = record
    if own == names:
        return numbers
    padded = torch.cat([numbers, numbers.new_full((1,), torch.nan)])
    return padded[[own.index(name) if name in own else -1 for name in names]]
