"""In which order rows on disk are read: shuffled, and still by stretches."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

UNIFORM = 2**28  # bytes: rows of less are shuffled freely, wherever single rows can be read
BLOCK, BLOCKS = 2**20, 64  # bytes of a block of rows, blocks in a buffer
BATCHES = 8  # a buffer holds at least so many batches


@dataclass(frozen=True)
class Blocks:
    """Blocks of neighbouring rows in random order; rows are shuffled within a buffer of blocks.

    Every row comes once in an epoch, each is equally likely in each batch, and the disk is read by
    blocks. Rows that lie together on disk come together more often than by chance, so data that are
    sorted there give noisier gradients (not biased ones).

    Args:
        size: rows in all.
        rows: in a block.
        count: blocks in a buffer.
    """

    size: int
    rows: int
    count: int

    @classmethod
    def of(cls, size: int, row_bytes: int, chunk: int, batch_size: int) -> "Blocks":
        """Blocks of about a megabyte and whole chunks, buffers of about 64."""
        rows = max(1, round(BLOCK / max(row_bytes, 1) / chunk)) * chunk
        wanted = max(BLOCKS * BLOCK // max(rows * row_bytes, 1), BATCHES * batch_size // rows, 2)
        return cls(size, rows, wanted)

    def buffers(self, generator: torch.Generator) -> Iterator[tuple[list[range], Tensor]]:
        """The stretches of each buffer, and the order of their rows in batches."""
        number = -(-self.size // self.rows)
        order = torch.randperm(number, generator=generator)
        for blocks in order.split(self.count):
            stretches = [self._block(int(i)) for i in blocks]
            total = sum(map(len, stretches))
            yield stretches, torch.randperm(total, generator=generator)

    def _block(self, i: int) -> range:
        return range(i * self.rows, min((i + 1) * self.rows, self.size))


def own_generator() -> torch.Generator:
    """A stream of an epoch's own, so that its order does not depend on what is drawn meanwhile."""
    return torch.Generator("cpu").manual_seed(int(torch.randint(2**62, (), device="cpu")))
