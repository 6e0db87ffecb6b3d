"""The state of every random stream that a fit may draw from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader

from pvi.fit.storage import Tree


def random_state(loader: DataLoader | None = None) -> Tree:
    """Torch's streams (also on CUDA devices), numpy's, Python's, and a loader's own."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "loader": [generator.get_state() for generator in _generators(loader)],
    }


def set_random_state(state: Tree, loader: DataLoader | None = None) -> None:
    """Continue all streams from an earlier state."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    for generator, own in zip(_generators(loader), state["loader"], strict=True):
        generator.set_state(own)


@contextmanager
def kept_random(loader: DataLoader | None = None) -> Iterator[None]:
    """Inside, whatever is drawn, all these streams go on afterwards as if it had not been."""
    now = random_state(loader)
    try:
        yield
    finally:
        set_random_state(now, loader)


def _generators(loader: DataLoader | None) -> list[torch.Generator]:
    """The generators of a loader and its samplers, each once."""
    parts = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    parts.append(getattr(parts[-1], "sampler", None))
    found = (getattr(part, "generator", None) for part in parts)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
