"""What a fit leaves behind on the screen and on disk, the same for every command."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pvi.posterior.arviz import load

MAX_ROWS = 60  # sites with more values stay out of the printed summary


def heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n", flush=True)


def paragraph(text: str) -> str:
    return textwrap.fill(text, 100)


def indented(text: object) -> str:
    return "\n".join(f"  {line}".rstrip() for line in str(text).splitlines())


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: for the small tensors of the demonstration, more are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save_draws(idata: Any, path: Path) -> None:
    """Write `InferenceData` or a `DataTree` as netCDF."""
    idata.to_netcdf(str(path), engine="h5netcdf")


def small_sites(idata: Any) -> tuple[list[str], list[str]]:
    """Names of the sites whose values can be listed, and of those that have too many."""
    sizes = {str(name): v[0, 0].size for name, v in idata["posterior"].data_vars.items()}
    names = [name for name, size in sizes.items() if size <= MAX_ROWS]
    return names, [name for name in sizes if name not in names]


def summary(idata: Any, var_names: Sequence[str]) -> str:
    """arviz's table of means, sds and intervals, without statistics meant for Markov chains."""
    return load().summary(idata, var_names=list(var_names), kind="stats").to_string()
