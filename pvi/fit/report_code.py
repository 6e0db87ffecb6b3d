"""The last section of a report: what it takes to make a fit again."""

import platform
from collections.abc import Mapping
from dataclasses import fields
from datetime import date
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pvi.guides
from pvi.engine import Objective
from pvi.engine.data import is_rows
from pvi.guides import Laplace
from pvi.page import Code, Numbers, Section, installed

if TYPE_CHECKING:
    from pvi.fit.report import Material
    from pvi.fit.result import Fit

PACKAGES = {"pvi": "pvi", "torch": "torch", "Pyro": "pyro-ppl", "arviz": "arviz", "numpy": "numpy"}
PLAIN = (bool, int, float, str, type(None))


def reproduction(m: "Material") -> Section:
    """Versions, device, seed and date, and the call."""
    rows = [("Python", platform.python_version(), "")]
    rows += [(label, installed(package), "") for label, package in PACKAGES.items()]
    devices = sorted({str(x.device) for x in m.fit.posterior.params.tensors().values()})
    rows.append(("Device", ", ".join(devices) or "cpu", ""))
    rows.append(("Seed", str(m.fit.seed), "" if m.fit.seed is not None else "not repeatable"))
    rows.append(("Date of this page", date.today().isoformat(), ""))
    code = Code(call(m.fit, m.diagnosis.num_draws, m.seed), "The call, as far as the fit knows it")
    return Section("How to make this fit again", [Numbers(rows), code])


def call(fit: "Fit", num_draws: int, seed: int) -> str:
    """The call of `pvi.fit` as code; what can't be written is a remark."""
    guide = type(fit.guide).__name__
    own = getattr(pvi.guides, guide, None) is type(fit.guide)
    lines = [
        f"    {name_of(fit.model)},",
        f"    {f'pvi.guides.{guide}' if own else name_of(fit.guide)},",
    ]
    lines += [f"    {text}" for text in _data(fit)]
    if fit.objective is not None:
        lines.append(f"    objective={_objective(fit.objective)},")
    given = dict(fit.arguments)
    by_hand = {key for key in ("optimizer", "scheduler") if given.get(key) == "given"}
    if _took_steps(fit) and "optimizer" not in given:
        given = {"optimizer": "adam", **given}
    for key, value in given.items():
        if key in by_hand:
            lines.append(f"    {key}=...,  # one of your own")
        elif key == "lr" and isinstance(value, list):
            lines.append(f"    lr={dict(value)!r},")
        else:
            lines.append(f"    {key}={value!r},")
    lines.append(f"    seed={fit.seed!r},")
    end = f"fit.diagnose({num_draws:_}, seed={seed})"
    return "\n".join(["import pvi", "", "fit = pvi.fit(", *lines, ")", end])


def _took_steps(fit: "Fit") -> bool:
    """Whether Adam was at work, not the deterministic route or Laplace's approximation."""
    return "num_draws" not in fit.history and not isinstance(fit.guide, Laplace)


def _data(fit: "Fit") -> list[str]:
    """The arguments that carry data, with their shapes."""
    data = fit.posterior.data
    names = [data.names[key] for key in data.entries] if data.entries else []
    keyed = any(isinstance(key, str) for key in data.entries)
    shapes = [_shape(x, data.size) for x in data.entries.values()]
    lines = []
    if keyed:
        pairs = ", ".join(f'"{name}": {name}' for name in names)
        lines.append(f"data={{{pairs}}},  # {'; '.join(shapes)}")
    elif names:
        lines.append(f"data=({', '.join(names)}{',' * (len(names) == 1)}),  # {'; '.join(shapes)}")
    lines += ["args=...,"] * bool(data.args) + ["kwargs=...,"] * bool(data.kwargs)
    return lines


def _shape(x: Any, rows: int) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    shape = (rows, *x.shape[1:]) if is_rows(x) else tuple(x.shape)
    return f"{tuple(shape)} {str(x.dtype).removeprefix('torch.')}"


def _objective(objective: Objective) -> str:
    """The options that are not the default."""
    options = {f.name: (getattr(objective, f.name), f.default) for f in fields(objective) if f.init}
    texts = [
        f"{name}={value!r}" if _plain(value) else f"{name}=..."
        for name, (value, default) in options.items()
        if not _plain(value) or value != default
    ]
    return f"pvi.Objective({', '.join(texts)})"


def _plain(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else [value]
    return all(isinstance(part, PLAIN) for part in parts)


def name_of(program: Any) -> str:
    """A program's name as its author wrote it: `schools`, `VAE.model`, `MeanField`."""
    while hasattr(program, "func"):  # functools.partial
        program = program.func
    if isinstance(program, torch.nn.Module) or not hasattr(program, "__qualname__"):
        return type(program).__name__
    return program.__qualname__.rpartition("<locals>.")[2]
