"""A user's own program, data, guide and objective from the words of a command line."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro.infer.autoguide as autoguide
import torch

import pvi
from pvi.engine import Objective


class UsageError(Exception):
    """Words that can't be understood; the message says what was available."""


def load_program(spec: str, what: str = "model") -> Any:
    """The object NAME of the file in `FILE.py:NAME`; NAME may have dots, as in `vae.model`."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not name:
        raise UsageError(f"{what} must look like FILE.py:NAME, got {spec!r}")
    if not path.is_file():
        raise UsageError(f"{what}: there is no file {file}")
    program: Any = _module(path.resolve())
    for part in name.split("."):
        if not hasattr(program, part):
            raise UsageError(f"{what}: {file} has no {name!r}; it has {_callables(path)}")
        program = getattr(program, part)
    if not callable(program):
        kind = type(program).__name__
        raise UsageError(f"{what}: {name!r} in {file} is a {kind}; it has {_callables(path)}")
    return program


@cache
def _module(path: Path) -> Any:
    """The user's file as a module, read once so that model and guide share its objects."""
    found = importlib.util.spec_from_file_location(f"pvi_program_{path.stem}", path)
    if found is None or found.loader is None:
        raise UsageError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses and pickle look their module up there
    sys.path.insert(0, str(path.parent))  # as `python FILE.py` does
    cached, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # it leaves no cache either
    try:
        found.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise UsageError(
            f"{path.name} can't be imported: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.dont_write_bytecode = cached
        sys.path.remove(str(path.parent))
    return module


def _callables(path: Path) -> str:
    """The names in a file that may be programs, for messages."""
    module = _module(path.resolve())
    names = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    return ", ".join(names) or "no functions or modules of its own"


def load_data(path: Path, model: Callable) -> tuple[dict[str, Any], list[str]]:
    """The columns of a file that the model's parameters name, and those left over.

    Raises:
        UsageError: the file can't be read, or a parameter without default has no column.
    """
    columns = _read(path)
    target = model.forward if isinstance(model, torch.nn.Module) else model
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
    for name, values in used.items():
        if values.dtype.kind not in "biuf":
            raise UsageError(
                f"column {name!r} of {path.name} holds {values.dtype} values, such as "
                f"{values.flat[0]!r}: code them as numbers first"
            )
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
    return {str(name): frame[name].to_numpy(copy=True) for name in frame.columns}


def make_guide(word: str, model: Callable, spec: str) -> Any:
    """A guide from its name in `pvi.guides`, Pyro's autoguides or the model's file.

    Args:
        word: the name, or `FILE.py:NAME`.
        spec: where the model came from, `FILE.py:NAME`.
    """
    families = {n: getattr(pvi.guides, n) for n in pvi.guides.__all__ if _takes_a_model(n)}
    families |= {n: getattr(autoguide, n) for n in autoguide.__all__ if _is_family(n)}
    if word in families:
        return families[word](model)
    path = Path(spec.rpartition(":")[0])
    if ":" not in word and not hasattr(_module(path.resolve()), word.split(".")[0]):
        listed = f"{', '.join(sorted(families))}, and in {path.name}: {_callables(path)}"
        raise UsageError(f"there is no guide {word!r}; there are {listed}")
    guide = load_program(word if ":" in word else f"{path}:{word}", "guide")
    return guide(model) if isinstance(guide, type) else guide


def _takes_a_model(name: str) -> bool:
    """Whether a guide of ours can be made from a model alone."""
    kind = getattr(pvi.guides, name)
    known = isinstance(kind, type) and kind is not pvi.guides.Guide
    return known and next(iter(inspect.signature(kind).parameters)) == "model"


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
