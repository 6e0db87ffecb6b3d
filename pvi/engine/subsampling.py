"""Minibatches without editing the programs: plates of the batch's length stand for the whole
data.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pvi.engine.traces import rng_state


class Minibatch(Messenger):
    """Effect handler that treats the named plates as a subsample `indices` of `size` rows.

    Sites inside get the scale size / batch, parameters declared with `event_dim` and `size` rows
    are read at the batch's rows, and the plate's own value is the batch's row numbers in the data
    (`feed=True`, for `loc[i]` in a guide) or 0..B-1 (for `x[i]`, where x already is the batch).

    Wrap each program once, `Minibatch(...)(model)`, and set `indices` before every call; `None`
    leaves the programs alone.
    """

    def __init__(self, plates: Iterable[str], size: int, *, feed: bool):
        super().__init__()
        self.plates, self.size, self.feed = frozenset(plates), size, feed
        self.indices: Tensor | None = None

    def _active(self, name: str) -> bool:
        return self.indices is not None and name in self.plates

    def _value(self) -> Tensor:
        indices = self.indices
        if indices is None:
            raise RuntimeError("no minibatch is set")
        return indices if self.feed else torch.arange(len(indices), device=indices.device)

    def _pyro_sample(self, msg: dict) -> None:
        if type(msg["fn"]) is _Subsample and self._active(msg["name"]):
            msg["value"], msg["done"] = self._value(), True
        self._rescale(msg)

    def _pyro_post_sample(self, msg: dict) -> None:
        if type(msg["fn"]) is _Subsample and self._active(msg["name"]):
            msg["value"] = self._value()  # an outer replay has put the guide's indices there

    def _pyro_pvi_effect(self, msg: dict) -> None:
        self._rescale(msg)

    def _pyro_param(self, msg: dict) -> None:
        self._rescale(msg)

    def _pyro_subsample(self, msg: dict) -> None:
        self._rescale(msg)

    def _rescale(self, msg: dict) -> None:
        """Give the batch's plates their full size; plates that were declared with it have it
        already.
        """
        frames = []
        for frame in msg["cond_indep_stack"]:
            if self._active(frame.name) and self._is_batch(frame):
                msg["scale"] = msg["scale"] * self.size / frame.size
                frame = frame._replace(full_size=self.size)
            frames.append(frame)
        msg["cond_indep_stack"] = tuple(frames)

    def _is_batch(self, frame) -> bool:
        indices = self.indices
        declared = frame.full_size in (None, frame.size)
        return indices is not None and declared and frame.size == len(indices) != self.size

    def _pyro_post_param(self, msg: dict) -> None:
        """Read the batch's rows, outermost first: before the plate checks the shape."""
        event_dim, indices = msg["kwargs"].get("event_dim"), self.indices
        if event_dim is None or indices is None:
            return
        for frame in msg["cond_indep_stack"]:
            if frame.dim is None or not self._active(frame.name) or self._declared(frame.name):
                continue
            value, dim = msg["value"], frame.dim - event_dim
            rows = value.shape[dim] if value.dim() >= -dim else 1
            if rows == self.size != frame.size:
                msg["value"] = _rows(value, dim, indices)

    def _declared(self, name: str) -> bool:
        """Whether the running program declared the plate with the full size: it indexes by
        itself.
        """
        return any(
            getattr(m, "name", None) == name and getattr(m, "size", None) == self.size
            for m in _PYRO_STACK
        )


class OwnNoise(Messenger):
    """Effect handler: inside the named plates, draw from a random stream of one process's own.

    Outside, all processes of a fit draw the same. The stream is started at each site from a number
    drawn outside, so that the common stream stays common, however much is drawn inside.

    Args:
        rank: of this process.
    """

    def __init__(self, plates: Iterable[str], rank: int):
        super().__init__()
        self._plates, self._rank = frozenset(plates), rank
        self._common: list[Tensor] | None = None

    def _pyro_sample(self, msg: dict) -> None:
        inside = any(frame.name in self._plates for frame in msg["cond_indep_stack"])
        if inside and not msg["is_observed"] and type(msg["fn"]) is not _Subsample:
            seed = int(torch.randint(2**62, (), device="cpu"))
            self._common = rng_state()
            torch.manual_seed(seed + self._rank)

    def _pyro_post_sample(self, msg: dict) -> None:
        self._back()

    def __exit__(self, *error: Any) -> Any:
        self._back()  # from a site that raised an error
        return super().__exit__(*error)

    def _back(self) -> None:
        if self._common is not None:
            torch.set_rng_state(self._common[0])
            if len(self._common) > 1:
                torch.cuda.set_rng_state_all(self._common[1:])
            self._common = None


def _rows(value: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Rows of a constrained parameter that still knows its unconstrained leaf, as Pyro expects."""
    selected = value.index_select(dim, indices)
    if hasattr(value, "unconstrained"):
        selected.unconstrained = value.unconstrained  # type: ignore[attr-defined]
    return selected


def plate_frames(nodes: Mapping[str, dict]) -> dict[str, tuple[int, int | None, int | None]]:
    """(size, full size, dim) of every plate around these nodes."""
    return {
        f.name: (f.size, f.full_size, f.dim)
        for node in nodes.values()
        for f in node["cond_indep_stack"]
    }
