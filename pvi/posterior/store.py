"""Draws that are written to netCDF piece by piece, and read from there when they are used."""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pvi.errors import DataError


def write(pieces: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write datasets by group; each piece holds further draws of the same groups."""
    import h5netcdf
    import xarray

    pieces = iter(pieces)
    first = next(pieces)
    endless = {f"/{group}": ["draw"] for group in first}
    chunks = {f"/{group}": _chunks(data) for group, data in first.items()}
    tree = xarray.DataTree.from_dict(dict(first))
    tree.to_netcdf(path, engine="h5netcdf", unlimited_dims=endless, encoding=chunks)
    with h5netcdf.File(path, "a") as file:
        for piece in pieces:
            for group, data in piece.items():
                _append(file[group], data)
            _trim()


def _trim() -> None:
    """Give freed memory back: glibc alone keeps what lies between small blocks in use, here most
    of what was ever written.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def add(groups: Mapping[str, Any], path: Path) -> None:
    """Add whole groups to a file."""
    for group, data in groups.items():
        data.to_netcdf(path, mode="a", group=group, engine="h5netcdf")


def opened(path: Path) -> Any:
    """The file as an `xarray.DataTree` whose values are read when they are used."""
    import xarray

    return xarray.open_datatree(path, engine="h5netcdf")


@contextmanager
def replacing(path: Any) -> Iterator[Path | None]:
    """Where to write: a new file, which takes the place of `path` in the end, or goes on an error.

    Raises:
        DataError: it is no netCDF file.
    """
    if path is None:
        yield None
        return
    path = Path(path)
    if path.suffix not in (".nc", ".h5", ".hdf5"):
        raise DataError(
            f"path must end in .nc (netCDF), got '{path}'. For zarr: "
            "to_datatree(path='draws.nc').to_zarr('draws.zarr')"
        )
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


CHUNK = 1 << 18  # numbers that are read from the file together


def _chunks(data: Any) -> dict[str, dict]:
    """Chunks along the draws and, where one draw is large, along its first dimension."""
    found = {}
    for name, variable in data.data_vars.items():
        shape = list(variable.shape)
        size = max(1, variable[0, 0].size)
        shape[1] = max(1, min(shape[1], CHUNK // size))
        if size > CHUNK and len(shape) > 2:
            shape[2] = _part(shape[2], max(1, CHUNK * shape[2] // size))
        found[str(name)] = {"chunksizes": tuple(shape)}
    return found


def _part(num: int, most: int) -> int:
    """At most so many of `num` things: in parts of this size the last has little to pad."""
    parts = -(-num // most)
    sizes = [-(-num // k) for k in range(parts, 2 * parts + 1)]
    return min(sizes, key=lambda size: -(-num // size) * size)


def _append(group: Any, data: Any) -> None:
    start = group.dimensions["draw"].size
    stop = start + data.sizes["draw"]
    group.resize_dimension("draw", stop)
    group.variables["draw"][start:stop] = data["draw"].values
    for name, variable in data.data_vars.items():
        target = group.variables[str(name)]
        target[:, start:stop] = variable.values.astype(target.dtype)
