"""Checkpoints of a fit: written as it goes, and where it goes on from."""

import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from pvi.errors import CheckpointError, FitError
from pvi.fit.distributed import ALONE, Team
from pvi.fit.drift import leaves_in
from pvi.fit.history import History
from pvi.fit.random import random_state, set_random_state
from pvi.fit.storage import STATE, Tree, read, write
from pvi.fit.training import Training
from pvi.fit.values import create_missing, put_values, values_of

SECONDS = 30.0  # between checkpoints, unless a number of steps was given
KEPT = 2


class Checkpoints:
    """The checkpoints in one folder, as folders `step-000123` of which the last two are kept.

    Args:
        folder: made if it is not there.
        every: steps between checkpoints; `None` for one every half a minute.
        team: the processes of the fit; the first of them reads and writes.

    Raises:
        FitError: options that make no sense.
    """

    def __init__(self, folder: Any, every: int | None, team: Team = ALONE):
        if every is not None and (not isinstance(every, int) or every < 1):
            raise FitError(f"every must be a whole number of steps >= 1, got {every!r}")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise FitError(f"checkpoint={str(folder)!r} is a file; give the name of a folder")
        self._every, self._last, self._written = every, time.monotonic(), 0
        self._interrupted, self._team = False, team

    @property
    def every(self) -> int:
        """Steps between checkpoints; 0 where the clock decides."""
        return self._every or 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to go on from."""
        return not self._found()

    def resume(self, training: Training) -> None:
        """Put a training where the last good checkpoint was; with none, leave it at its start.

        Raises:
            CheckpointError: all of them are damaged, or they belong to another fit.
        """
        state, where = self._team.first_says(self._latest)
        if state is not None:
            restore(training, state, where)
            self._written = training.step

    def _latest(self) -> tuple[Tree | None, Path]:
        """The last good checkpoint, and its file; `None` if there is none."""
        self._sweep()
        damaged: list[str] = []
        for folder in reversed(self._found()):
            try:
                state = read(folder)
                if state.get("kind") != "checkpoint":
                    raise CheckpointError(f"{folder / STATE} is no checkpoint. Use another folder.")
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            if damaged:
                warnings.warn(f"{damaged[0]} Going on from {folder.name}.", stacklevel=8)
            return state, folder / STATE
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: {damaged[0]} Delete the folder, or "
                "name another, to start again."
            )
        return None, self.folder

    def after_step(self, training: Training) -> None:
        """Write a checkpoint if it is time; stop here if the user has asked to."""
        if self._interrupted:
            raise KeyboardInterrupt
        if self._every is None:
            due = time.monotonic() - self._last >= SECONDS
        else:
            due = training.step % self._every == 0
        if due:
            self.write(training)

    def write(self, training: Training) -> None:
        """Write a checkpoint of this step, unless there is one or a step is half done.

        A checkpoint that can't be written is a warning: the fit is worth more than its copy.
        """
        if not training.whole or training.step == self._written or not self._team.first:
            return
        try:
            write(self.folder / f"step-{training.step:06d}", state_of(training))
            self._written = training.step
            self._drop_old()
        except OSError as error:
            self._warn(f"{error.strerror or error}), and tries again; make room there.")
        except CheckpointError as error:
            self._warn(f"{error}). Use another optimizer.")
        self._last = time.monotonic()

    @contextmanager
    def whole_steps(self) -> Iterator[None]:
        """Let Ctrl-C wait for the end of a step, so that it can be kept; a second one does not."""
        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _warn(self, why: str) -> None:
        text = f"no checkpoint could be written to {self.folder}; the fit goes on ({why}"
        warnings.warn(text, stacklevel=7)

    def _found(self) -> list[Path]:
        """Checkpoints from the oldest to the newest."""
        numbered = {p: re.fullmatch(r"step-(\d+)", p.name) for p in self.folder.glob("step-*")}
        return sorted((p for p, m in numbered.items() if m), key=lambda p: int(p.name[5:]))

    def _drop_old(self) -> None:
        """Keep the last two, and what lies ahead of them."""
        past = [p for p in self._found() if int(p.name[5:]) <= self._written]
        for folder in past[:-KEPT]:
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a process that was killed has left half written."""
        for folder in self.folder.glob(".step-*"):
            if re.fullmatch(r"\.step-\d+\.\d+\.(tmp|old)", folder.name):
                shutil.rmtree(folder, ignore_errors=True)


def state_of(training: Training) -> Tree:
    """All that decides what comes next, as plain data."""
    task, schedule = training.task, training.schedule
    names = {id(x): name for name, x in task.params.tensors().items()}
    optimizer = training.optimizer.state_dict()
    plateau = schedule.plateau
    return {
        "kind": "checkpoint",
        "fit": training.fingerprint,
        "step": training.step,
        "recovery": training.recovery.state(),
        "validation": None if training.validation is None else training.validation.state(),
        "scheduler": None if training.scheduler is None else training.scheduler.state_dict(),
        "damping": schedule.damping,
        "unread": training.unread(),
        "parameters": values_of(task.params),
        "groups": [[names[id(p)] for p in g["params"]] for g in training.optimizer.param_groups],
        "optimizer": {"state": optimizer["state"], "groups": _options(optimizer)},
        "plateau": None if plateau is None else plateau.state(),
        "averages": None if training.averages is None else training.averages.state(),
        "path": [[at, {names[key]: x for key, x in xs.items()}] for at, xs in training.path.kept],
        "baselines": dict(task.baseline().means),
        "adversaries": task.arena.state(),
        "history": training.history.tensors(),
        "random": random_state(task.data.loader),
        **training.epochs.state(),
    }


def restore(training: Training, state: Tree, where: Path) -> None:
    """Put a training that has not begun where `state_of` was.

    Raises:
        CheckpointError: it belongs to another fit.
    """
    task, schedule = training.task, training.schedule
    _check_same(state["fit"], training.fingerprint, where)
    task.look()  # before anything is restored: programs with buffers change when they are run
    create_missing(task.params, state["parameters"], where)
    _restore_optimizer(training, state, where)
    put_values(task.params, state["parameters"], where)
    tensors = task.params.tensors()
    training.step, schedule.damping = state["step"], state["damping"]
    training.epochs.restore(state)
    if schedule.plateau is not None:
        schedule.plateau.restore(state["plateau"])
    if training.averages is not None:
        training.averages.restore(state["averages"])
    training.path.kept = [
        (at, {id(tensors[name]): x.to(tensors[name]) for name, x in values.items()})
        for at, values in state["path"]
    ]
    device = next(iter(tensors.values())).device
    task.baseline().means = {name: x.to(device) for name, x in state["baselines"].items()}
    training.recovery.restore(state["recovery"], device)
    if task.arena.adversaries:
        task.arena.restore(state["adversaries"])
    if training.validation is not None:
        training.validation.restore(state["validation"])
    if training.scheduler is not None:
        training.scheduler.load_state_dict(state["scheduler"])
    training.remember(state["unread"])
    task.history = History.of(state["history"])
    training.bar.skip(training.step)
    training.whole = True
    set_random_state(state["random"], task.data.loader)


def _restore_optimizer(training: Training, state: Tree, where: Path) -> None:
    """Groups of parameters in the order in which they came, their options and the state of each."""
    optimizer, tensors = training.optimizer, training.task.params.tensors()
    for names in state["groups"][len(optimizer.param_groups) :]:
        training.adopt(_named(training, {name: tensors[name] for name in names}))
    here = {id(x): name for name, x in tensors.items()}
    groups = [[here[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if groups != state["groups"]:
        missing = sorted({n for g in state["groups"] for n in g} ^ {n for g in groups for n in g})
        raise CheckpointError(
            f"{where} is of a fit that trained other parameters, or in another order: "
            f"{missing or groups} differ. Pass the programs and the optimizer of that fit."
        )
    first = iter(range(len(leaves_in(optimizer))))
    numbered = [
        {**options, "params": [next(first) for _ in names]}
        for options, names in zip(state["optimizer"]["groups"], groups, strict=True)
    ]
    saved = {"state": state["optimizer"]["state"], "param_groups": numbered}
    optimizer.load_state_dict(saved)


def _named(training: Training, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """These tensors by the names that `Params.named` gives them."""
    ids = {id(x) for x in wanted.values()}
    return {n: x for n, x in training.task.params.named().items() if id(x) in ids}


def _options(optimizer: Tree) -> list[Tree]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer["param_groups"]]


def _check_same(saved: Tree, here: Tree, where: Path) -> None:
    for key in [*saved, *(here.keys() - saved.keys())]:
        if saved.get(key) != here.get(key):
            raise CheckpointError(
                f"{where} is of another fit: {key} was {saved.get(key)}, but here it is "
                f"{here.get(key)}. Pass what was passed then to go on, or another checkpoint= "
                "folder to start again."
            )
