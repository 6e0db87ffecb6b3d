"""A user's own program, data, guide and objective from the words of a command line."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro.infer.autoguide as autoguide

import pvi
from pvi.engine import Objective


class UsageError(Exception):
    """Words that can't be understood; the message says what was available."""


def load_program(spec: str, what: str = "model") -> Any:
    """The object NAME of the file in `FILE.py:NAME`."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not name:
        raise UsageError(f"{what} must look like FILE.py:NAME, got {spec!r}")
    if not path.is_file():
        raise UsageError(f"{what}: there is no file {file}")
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise UsageError(f"{what}: {file} is not a Python file")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not hasattr(module, name):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(f"{what}: {file} has no {name!r}; it has {', '.join(names) or 'none'}")
    return getattr(module, name)


def load_data(path: Path, model: Callable) -> tuple[dict[str, Any], list[str]]:
    """The columns of a file that the model's parameters name, and those left over.

    Raises:
        UsageError: the file can't be read, or a parameter without default has no column.
    """
    columns = _read(path)
    target = getattr(model, "forward", model)
    parameters = inspect.signature(target).parameters
    needed = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    missing = [n for n in needed if n not in columns]
    if missing:
        raise UsageError(
            f"the model's argument {missing[0]!r} has no column in {path.name}. The model takes "
            f"{', '.join(parameters)}; the file has {', '.join(columns)}. Columns become arguments "
            "by name: rename one of them."
        )
    used = {n: columns[n] for n in parameters if n in columns}
    return used, [n for n in columns if n not in used]


def _read(path: Path) -> Mapping[str, np.ndarray]:
    if not path.is_file():
        raise UsageError(f"there is no data file {path}")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    import pandas

    readers = {".csv": pandas.read_csv, ".parquet": pandas.read_parquet}
    if path.suffix not in readers:
        raise UsageError(f"data must be .csv, .npz or .parquet, got {path.name}")
    try:
        frame = readers[path.suffix](path)
    except ImportError as error:
        raise UsageError(f"reading {path.name} needs another package: {error}") from error
    return {str(name): frame[name].to_numpy() for name in frame.columns}


def make_guide(word: str, model: Callable) -> Any:
    """A guide from its name in `pvi.guides` or Pyro's autoguides, or from `FILE.py:NAME`."""
    if ":" in word:
        guide = load_program(word, "guide")
        return guide(model) if isinstance(guide, type) else guide
    families = {n: getattr(pvi.guides, n) for n in pvi.guides.__all__ if n[0].isupper()}
    families.pop("Guide", None)
    families |= {n: getattr(autoguide, n) for n in autoguide.__all__ if _is_family(n)}
    if word not in families:
        raise UsageError(f"there is no guide {word!r}; there are {', '.join(sorted(families))}")
    return families[word](model)


def _is_family(name: str) -> bool:
    return name.startswith("Auto") and name not in ("AutoCallable", "AutoGuide", "AutoGuideList")


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "ELBO": lambda k=1: pvi.ELBO(int(k)),
    "TraceMeanFieldELBO": lambda k=1: pvi.TraceMeanFieldELBO(int(k)),
    "BetaELBO": lambda beta, k=1: pvi.BetaELBO(float(beta), int(k)),
    "IWAE": lambda k: pvi.IWAE(int(k)),
    "RenyiELBO": lambda alpha, k: pvi.RenyiELBO(float(alpha), int(k)),
}
FORMS = "ELBO[:K], TraceMeanFieldELBO[:K], BetaELBO:beta[:K], IWAE:K, RenyiELBO:alpha:K"


def make_objective(words: str) -> Objective:
    """An objective from words such as `IWAE:8`."""
    name, *numbers = words.split(":")
    if name not in OBJECTIVES:
        raise UsageError(f"there is no objective {name!r}; use one of {FORMS}")
    try:
        return OBJECTIVES[name](*numbers)
    except (TypeError, ValueError) as error:
        if isinstance(error, pvi.PviError):
            raise
        raise UsageError(f"can't read objective {words!r}; use one of {FORMS}") from error
