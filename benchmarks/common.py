"""What the benchmarks share: options, machine, table, JSON."""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyro
import torch

import pvi
from pvi.text import table

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None, *, data: bool = False) -> argparse.ArgumentParser:
    """Options that every benchmark takes; `data=True` adds the folder it reads."""
    result = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    result.add_argument("--seed", type=int, default=0, help="first seed")
    result.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    if data:
        result.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    return result


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, threads, versions, date. No host names, no paths."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "pvi": pvi.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        **({"allocator": Path(preloaded).name} if (preloaded := os.getenv("LD_PRELOAD")) else {}),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(
    name: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    results: Path,
    *,
    key: str = "rows",
    more: Mapping[str, Any] | None = None,
) -> None:
    """Print a table and add it under `key` to the benchmark's JSON."""
    print(table(header, [[_shown(cell) for cell in row] for row in rows]), end="\n\n", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() and key != "rows" else {}
    records = [dict(zip(header, row, strict=True)) for row in rows]
    content = {**old, "machine": machine(), **(more or {}), key: records}
    path.write_text(json.dumps(content, indent=1, default=float) + "\n")


def _shown(cell: Any) -> str:
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


@contextmanager
def timed() -> Iterator[list[float]]:
    """A list that holds the seconds spent inside, once it is over."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)
