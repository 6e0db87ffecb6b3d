"""Finished simulations in a folder, so that a later call goes on."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pvi.errors import CheckpointError
from pvi.fit.storage import read, write
from pvi.workflow.simulation import Record

SETTINGS = "settings"


class Folder:
    """Records in a folder, each in one of its own, written as a whole or not at all.

    Args:
        path: made if it is not there.
        settings: what makes these simulations these; `seed` may be `None` to take the one that is
            there.

    Raises:
        CheckpointError: it holds simulations of another model, or with other settings.
    """

    def __init__(self, path: Any, settings: Mapping[str, Any]):
        self.path = Path(path)
        known = self.path / SETTINGS
        if not known.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise CheckpointError(
                    f"path={str(path)!r} holds other files: give a new or an empty folder"
                )
            write(known, settings)
            return
        saved = read(known)
        for key in settings:
            if not same(saved.get(key), settings[key]):
                raise CheckpointError(
                    f"path={str(path)!r} holds simulations of another model or with other "
                    f"settings: {key} was {saved.get(key)}, but here it is {settings[key]}. Pass "
                    "what was passed then to go on, or another path."
                )

    def records(self) -> dict[int, Record]:
        """Those that are there; ones that can't be read are made again."""
        found = {}
        for folder in self.path.glob("simulation-*"):
            try:
                tree = read(folder)
            except CheckpointError:
                continue
            arrays = {k: {n: x.numpy() for n, x in v.items()} for k, v in tree["values"].items()}
            found[tree["number"]] = Record(**{**tree, "values": arrays})
        return found

    def save(self, record: Record) -> None:
        """Add a record."""
        values = {
            key: {name: torch.from_numpy(x.copy()) for name, x in arrays.items()}
            for key, arrays in record.values.items()
        }
        folder = self.path / f"simulation-{record.number:06d}"
        write(folder, {**vars(record), "values": values})


def saved_seed(path: Any) -> int | None:
    """The seed of the simulations in a folder, or `None`."""
    known = Path(path) / SETTINGS
    return read(known)["seed"] if known.exists() else None


def same(saved: Any, here: Any) -> bool:
    """Equality of plain data, of floats up to rounding on another machine."""
    if isinstance(saved, float) and isinstance(here, float):
        return math.isclose(saved, here, rel_tol=1e-3, abs_tol=1e-6) or saved is here
    if isinstance(saved, Mapping) and isinstance(here, Mapping):
        return saved.keys() == here.keys() and all(same(saved[k], here[k]) for k in saved)
    return saved == here
