"""One fit by several processes, each with its share of every batch: `torchrun` and `pvi.fit`.

torch.distributed does the work. All processes hold the same parameters and draw the same order of
rows and the same noise of global latents, so that the mean of their gradients is that of one
process with the whole batch:

$$\\frac1P \\sum_r \\Bigl[\\mathrm{KL} - \\frac{N}{B/P} \\sum_{i \\in r} \\ell_i\\Bigr]
= \\mathrm{KL} - \\frac NB \\sum_i \\ell_i.$$
"""

import atexit
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from pvi.engine import Objective
from pvi.engine.data import Data
from pvi.engine.rows import Part
from pvi.errors import CheckpointError, DataError, FitError, ObjectiveError, PviError
from pvi.fit.random import kept_random

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


@dataclass(frozen=True)
class Team:
    """The processes of one fit; alone, everything here does nothing.

    Args:
        rank, number: of this process, and of all.
    """

    rank: int = 0
    number: int = 1

    @property
    def part(self) -> Part:
        return self.rank, self.number

    @property
    def alone(self) -> bool:
        return self.number == 1

    @property
    def first(self) -> bool:
        """Whether this process writes and shows for all."""
        return self.rank == 0

    def device(self, wanted: Any) -> Any:
        """The process's own GPU where "cuda" is asked for."""
        if self.alone or wanted is None or torch.device(wanted) != torch.device("cuda"):
            return wanted
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
        torch.cuda.set_device(own)
        return own

    def average(self, record: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        """Put the mean gradient of all processes into `leaves`; return the mean of the records.

        One message: gradients, which of them exist anywhere, and the record.

        Args:
            record: numbers `(R,)`, as many in each process, times the weight of its share.
            leaves: the parameters, with their gradients.
        """
        if self.alone:
            return record
        device, mine = leaves[0].device, [p.grad is not None for p in leaves]
        grads = [_dense(p) for p in leaves]
        known = torch.tensor(mine, device=device)
        widest = max((x.dtype for x in (*grads, record)), key=lambda dtype: dtype.itemsize)
        parts = [*(g.reshape(-1) for g in grads), known, record]
        flat = torch.cat([part.to(device, widest) for part in parts])
        self._all(flat).div_(self.number)
        *means, known, numbers = flat.split([part.numel() for part in parts])
        exist = mine if all(mine) else known.tolist()  # asked only where it is in doubt
        for p, mean, exists in zip(leaves, means, exist, strict=True):
            if exists:
                p.grad = mean.reshape(p.shape).to(p).clone()
        return numbers.to(record)

    def mean(self, value: float, weight: float = 1.0) -> float:
        """The mean of a number over all processes."""
        if self.alone:
            return value
        return float(self._all(torch.tensor(value * weight, dtype=torch.float64))) / self.number

    def means(self, values: Tensor) -> Tensor:
        """The means of some numbers over all processes."""
        return values if self.alone else self._all(values.clone()).div_(self.number)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self.alone else self.mean(float(flag)) > 0

    def first_of(self, mine: Any) -> Any:
        """What the first process says that has something to say, for all.

        Args:
            mine: what this one says; false if it is nothing.
        """
        if self.alone or not self.any(bool(mine)):
            return mine
        said: list[Any] = [None] * self.number
        dist.all_gather_object(said, mine)
        return next(filter(None, said))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values."""
        if self.alone:
            return
        with torch.no_grad():
            for x in tensors:
                sent = _sendable(x.detach().contiguous())
                dist.broadcast(sent, 0)
                x.copy_(sent)

    def same_random(self) -> None:
        """Let all processes go on from the first one's random state."""
        if self.alone:
            return
        state = _sendable(torch.get_rng_state())
        dist.broadcast(state, 0)
        torch.set_rng_state(state.cpu())
        if torch.cuda.is_initialized():
            state = _sendable(torch.cuda.get_rng_state())
            dist.broadcast(state, 0)
            torch.cuda.set_rng_state(state.cpu())

    def first_says(self, what: Callable[[], Any]) -> Any:
        """What the first process finds, for all; or its error."""
        if self.alone:
            return what()
        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = what()
            except PviError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said, 0)
        if said[1] is not None:
            raise CheckpointError(said[1])
        return said[0]

    def check(self, objective: Objective) -> None:
        """Refuse what is no mean over shares of a batch.

        Raises:
            ObjectiveError: naming the option.
        """
        if self.alone:
            return
        what = "weighting" if objective.weighting is not None else "gradient"
        if objective.weighting is not None or callable(objective.gradient):
            raise ObjectiveError(
                f"{what}= looks at a whole batch, so {self.number} processes with a share each "
                "can't average it. Use the plain objective, or one process."
            )

    def check_same(self, data: Data, batch_size: int | None) -> None:
        """Refuse loaders that give each process other rows: each takes its share by itself.

        Raises:
            DataError: they do.
        """
        if self.alone or data.numbered or _samples_by_itself(data):
            return
        with kept_random(data.loader):
            batch = next(data.batches(batch_size), None)
        mark = -1 if batch is None else batch.checksum()
        marks: list[Any] = [None] * self.number
        dist.all_gather_object(marks, mark)
        if len(set(marks)) > 1:
            raise DataError(
                f"the {self.number} processes read different batches, but each must read the same "
                "and takes its share of them. Seed the loader's shuffling, use torch's "
                "DistributedSampler, or don't split a stream by rank."
            )

    @staticmethod
    def _all(x: Tensor) -> Tensor:
        sent = _sendable(x)
        dist.all_reduce(sent)
        return sent if sent is x else x.copy_(sent)


ALONE = Team()


def join(device: Any) -> Team:
    """The processes that torchrun, or the user's own `init_process_group`, has started.

    Raises:
        FitError: the group can't be formed.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if any(name not in os.environ for name in NEEDED) or int(os.environ["WORLD_SIZE"]) == 1:
            return ALONE
        cuda = device is not None and torch.device(device).type == "cuda"
        try:
            _meet("cpu:gloo,cuda:nccl" if cuda else "gloo")
        except (RuntimeError, ValueError) as error:
            raise FitError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes can't meet "
                f"({str(error).splitlines()[0]}). Start the script with torchrun, or unset "
                "WORLD_SIZE to fit alone."
            ) from error
        atexit.register(_leave)
    number = dist.get_world_size()
    return ALONE if number == 1 else Team(dist.get_rank(), number)


def _meet(backend: str) -> None:
    """Form the group; after a restart under names of its own.

    torchrun keeps its store when it restarts processes, and torch 2.13 then finds the addresses of
    those that are gone there ("Connection refused").
    """
    store, rank, number = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"pvi/attempt{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=number)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _sendable(x: Tensor) -> Tensor:
    """The tensor where the group's backend can reach it."""
    backend = str(dist.get_backend())
    if x.device.type == "cpu" and "nccl" in backend and "gloo" not in backend:
        return x.to(torch.device("cuda", torch.cuda.current_device()))
    if x.device.type == "cuda" and backend == "gloo":
        return x.cpu()
    return x


def _dense(p: Tensor) -> Tensor:
    """The gradient of a parameter, 0 where it has none."""
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad.to_dense() if p.grad.is_sparse else p.grad


def _samples_by_itself(data: Data) -> bool:
    return isinstance(getattr(data.loader, "sampler", None), DistributedSampler)
