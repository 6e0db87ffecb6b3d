"""Plain data and tensors in a folder: safetensors and JSON, written as a whole or not at all.

Nothing is ever unpickled, so a file from anywhere can at worst be refused.
"""

import json
import os
import shutil
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from pvi.errors import CheckpointError

FORMAT = 1
TENSORS, STATE = "tensors.safetensors", "state.json"
Tree = dict[str, Any]
SIMPLE = (bool, int, float, str, type(None))


def write(folder: Path, tree: Mapping[str, Any]) -> None:
    """Write nested dicts, lists and tuples of numbers, strings and tensors to a new folder.

    Everything goes to a temporary folder and to the disk first, then the folder gets its name.

    Raises:
        OSError: the disk is full, or the folder can't be written.
        CheckpointError: something in the tree is no plain data.
    """
    tensors: dict[str, Tensor] = {}
    content = pack(tree, tensors)
    raw = tensor_bytes(tensors)
    versions = {"pvi": _version("pvi"), "torch": torch.__version__}
    body = {"format": FORMAT, **versions, "tensors_sha256": _hash(raw), "content": content}
    text = json.dumps({"sha256": _hash(json.dumps(body).encode()), "body": body}, indent=1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        _to_disk(fresh / TENSORS, raw)
        _to_disk(fresh / STATE, text.encode())
        _sync(fresh)
        if folder.exists():
            os.rename(folder, old)
        os.rename(fresh, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def read(folder: Path) -> Tree:
    """What `write` wrote.

    Raises:
        CheckpointError: a file is missing, cut off, changed, or of a later format.
    """
    body = _checked_body(folder / STATE)
    path = folder / TENSORS
    raw = _bytes(path)
    if _hash(raw) != body["tensors_sha256"]:
        raise CheckpointError(
            f"{path} is not the file that was written ({len(raw):,} bytes with another checksum): "
            "it was cut off or changed. Use an earlier copy."
        )
    try:
        return unpack(body["content"], read_tensors(raw))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit {STATE}: {error!r}. Use another one.") from None


def _checked_body(path: Path) -> Tree:
    raw = _bytes(path)
    try:
        text = json.loads(raw)
        body, expected = text["body"], text["sha256"]
        format_ = body["format"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is no state that pvi wrote, or it was cut off: expected JSON with a body and "
            "its checksum. Use an earlier copy, or another folder."
        ) from None
    if format_ != FORMAT:
        raise CheckpointError(
            f"{path} has format {format_!r}, but this pvi reads format {FORMAT}. Use the version "
            f"of pvi that wrote it ({body.get('pvi')})."
        )
    if _hash(json.dumps(body).encode()) != expected:
        raise CheckpointError(
            f"{path} was changed after it was written: its checksum differs. Use an earlier copy."
        )
    return body


def pack(tree: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A tree as JSON, its tensors moved to `tensors` under their paths."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"$tensor": name}
    if isinstance(tree, Mapping):
        items = {k: pack(v, tensors, f"{name}/{k}") for k, v in tree.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in items):
            return items
        if all(isinstance(key, int | str) for key in items):
            return {"$dict": [[key, value] for key, value in items.items()]}
    if isinstance(tree, list | tuple):
        items = [pack(value, tensors, f"{name}/{i}") for i, value in enumerate(tree)]
        return {"$tuple": items} if isinstance(tree, tuple) else items
    if isinstance(tree, SIMPLE):
        return tree
    raise CheckpointError(
        f"{name.strip('/')} is a {type(tree).__name__}, which can't be saved without pickle; only "
        "tensors, numbers, strings, lists and dicts of them can"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(packed, list):
        return [unpack(value, tensors) for value in packed]
    if not isinstance(packed, dict):
        return packed
    if "$tensor" in packed:
        return tensors[packed["$tensor"]]
    if "$tuple" in packed:
        return tuple(unpack(value, tensors) for value in packed["$tuple"])
    items = packed["$dict"] if "$dict" in packed else packed.items()
    return {key: unpack(value, tensors) for key, value in items}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read ({error.strerror}): expected a file that pvi wrote. Give the "
            "folder of a saved fit or checkpoint."
        ) from None


def _to_disk(path: Path, raw: bytes) -> None:
    with path.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make a folder's entries durable, where the system lets folders be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _hash(raw: bytes) -> str:
    return sha256(raw).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
