"""Simulations in several processes."""

import multiprocessing
import pickle
import signal
import sys
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from pvi.errors import FitError
from pvi.workflow.simulation import Record, Task

FORKED = (
    "the model, the guide or a test quantity can't be sent to fresh processes ({why}), so the "
    "workers were forked from this one. Define them in a module of their own, and import them."
)
ALONE = (
    "num_workers={num} was not used: the model, the guide or a test quantity can't be sent to "
    "other processes ({why}), and this one can't be forked ({fork}). Define them in a module of "
    "their own, and import them."
)
_task: Task  # of a worker, which `_start` gives it


def start_method(task: Task, num_workers: int) -> tuple[str, bytes | None, str]:
    """How to start workers: the method, "" for none; the task as bytes; and what the user should
    know.
    """
    if num_workers <= 1:
        return "", None, ""
    try:
        payload = pickle.dumps((task, torch.get_default_dtype()))
        why = "they are defined in __main__" if b"__main__" in payload else ""
    except Exception as error:  # pickle raises what the objects raise
        payload, why = b"", str(error).partition("\n")[0]
    if not why:
        return "spawn", payload, ""
    fork = "" if sys.platform == "linux" else f"on {sys.platform} that is not safe"
    fork = "CUDA is in use" if torch.cuda.is_initialized() else fork
    if fork:
        return "", None, ALONE.format(num=num_workers, why=why, fork=fork)
    return "fork", None, FORKED.format(why=why)


def records(
    task: Task, numbers: Sequence[int], num_workers: int, method: str, payload: bytes | None
) -> Generator[Record, None, None]:
    """The records of these simulations, each as it ends.

    Raises:
        FitError: a worker died.
    """
    if not method:
        yield from map(task.record, numbers)
        return
    context = multiprocessing.get_context(method)
    given = task if payload is None else None
    pool = ProcessPoolExecutor(num_workers, context, _start, (given, payload))
    try:
        with warnings.catch_warnings():  # Python 3.12 on forks of processes with threads
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            futures = [pool.submit(_record, number) for number in numbers]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise FitError(
            'a worker died. A script must call pvi.sbc under `if __name__ == "__main__":`, since '
            "its workers read it too; else memory may have run out: try num_workers=1."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(task: Task | None, payload: bytes | None) -> None:
    """In a worker: one thread, and Ctrl-C is the parent's business.

    Args:
        task: what a fork has in memory.
        payload: the same for a fresh process, as bytes.
    """
    global _task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    if task is not None:
        _task = task
    if payload is not None:
        _task, dtype = pickle.loads(payload)  # from our own parent
        torch.set_default_dtype(dtype)


def _record(number: int) -> Any:
    return _task.record(number)
