"""`Fit.save` and `pvi.load`: a fit in a folder, and back."""

import math
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvi.engine import Objective
from pvi.engine.checks import check, check_values
from pvi.engine.data import Data
from pvi.engine.params import Params
from pvi.engine.traces import Program, preserved_rng
from pvi.errors import CheckpointError, GuideError
from pvi.fit.history import History
from pvi.fit.programs import prepare
from pvi.fit.restarts import Mode
from pvi.fit.result import Fit
from pvi.fit.storage import STATE, Tree, read, write
from pvi.fit.values import create_missing, put_values, values_of
from pvi.guides import Guide
from pvi.posterior import Posterior

PLAIN = (bool, int, float, str, type(None))


def save(fit: Fit, folder: Any) -> None:
    """See `Fit.save`."""
    path = Path(folder)
    if path.exists() and not (path / STATE).exists() and (path.is_file() or any(path.iterdir())):
        raise CheckpointError(
            f"{path} holds other files, and a fit is saved as a folder of its own. Give a new name."
        )
    posterior = fit.posterior
    with posterior.drawing(None) as runner:
        state = {
            "kind": "fit",
            "parameters": values_of(posterior.params),
            "structure": _structure(fit.guide),
            "latents": sorted(runner.latent),
        }
    rest = {
        "history": fit.history.tensors(),
        "objective": _plain(fit.objective),
        "converged": fit.converged,
        "reason": fit.reason,
        "notes": list(fit.notes),
        "seed": fit.seed,
        "seconds": fit.seconds,
        "modes": [vars(mode) for mode in fit.modes],
        "arguments": dict(fit.arguments),
        "caveats": list(posterior.reservations),
    }
    write(path, state | rest)


def load(
    folder: Any,
    model: Program,
    guide: Program | None = None,
    data: Any = (),
    *,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
    reparam: Any = None,
    device: Any = None,
    num_data: int | None = None,
) -> Fit:
    """The fit that `Fit.save` put into a folder; its draws are the same, seed by seed.

    Files hold numbers and names only, never code, so pass the programs themselves.

    Args:
        folder: what was given to `Fit.save`.
        model, guide: as in `pvi.fit`: the same code, in new objects or old ones. The parameters
            of modules among them are overwritten.
        data, args, kwargs, reparam, device, num_data: as in `pvi.fit`. An amortised guide may get
            other data. Those that are not in memory are read when all rows are asked for.
        objective: the one of the fit, where it holds functions or schedules; it is `Fit.objective`
            and has no part in the posterior.

    Raises:
        CheckpointError: a file is damaged; model or guide have other sites or parameters.
        DataError, ModelError, GuideError: as in `pvi.fit`.
    """
    path = Path(folder)
    saved = read(path)
    if saved.get("kind") != "fit":
        raise CheckpointError(
            f"{path} holds no saved fit but a checkpoint. Pass its parent to "
            "pvi.fit(..., checkpoint=) to go on, and save the fit that this returns."
        )
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(torch.device(device) if device is not None else nullcontext())
        given = (model, guide, data, args, kwargs, reparam, device)
        model, guide, rows = prepare(*given, batch_size=1, num_data=num_data)
        params = _filled(model, guide, rows, saved, path)
    shared = {"params": params, "device": device, "checked": True}
    posterior = Posterior(model, guide, rows, caveats=tuple(saved["caveats"]), **shared)
    known = {key: saved[key] for key in ("converged", "reason", "seed")}
    known["notes"] = tuple(saved.get("notes", ()))
    known["modes"] = tuple(Mode(**mode) for mode in saved.get("modes", ()))
    known["seconds"] = saved.get("seconds", math.nan)
    known["arguments"] = saved.get("arguments", {})
    objective = objective or _objective(saved["objective"], path)
    return Fit(model, guide, objective, posterior, History.of(saved["history"]), **known)


def _filled(model: Program, guide: Program, rows: Data, saved: Tree, path: Path) -> Params:
    """The parameters of both programs, with the values that were saved."""
    restored = _restore_structure(guide, saved["structure"])
    params = Params(model, guide)
    check_values(rows.named())
    with params.scope(), params.evaluation():
        try:
            nodes = check(model, guide, *rows.probe(), rows.named())
        except GuideError as error:
            if not restored:
                raise
            raise CheckpointError(
                f"{path} holds a guide that does not fit this model: {error} Pass the model that "
                "was fitted, with the same reparam=."
            ) from None
        params.sync()
        _check_sites(nodes, saved["latents"], path)
        create_missing(params, saved["parameters"], path)
        put_values(params, saved["parameters"], path)
    params.freeze()
    return params


def _check_sites(nodes: Mapping[str, Any], saved: list[str], path: Path) -> None:
    here = sorted(name for name, node in nodes.items() if not node["is_observed"])
    if here != saved:
        raise CheckpointError(
            f"{path} is a fit of a model with latents {saved}, but this model has {here}. Pass the "
            "model that was fitted, with the same reparam=, and its observations as data."
        )


def _structure(guide: Program) -> dict[str, Tensor]:
    """What a guide of ours knows of its sites, so that it need not be set up again."""
    if not isinstance(guide, Guide):
        return {}
    return {k: v for k, v in guide.state_dict().items() if k.endswith("_extra_state")}


def _restore_structure(guide: Program, structure: Mapping[str, Tensor]) -> bool:
    """Prepare a guide that has no sites yet; one whose supports are not known sets itself up."""
    if not isinstance(guide, Guide) or guide.latents or not structure:
        return False
    try:
        guide.load_state_dict(dict(structure), strict=False)
    except GuideError:
        guide.latents = {}
    return bool(guide.latents)


def _plain(objective: Objective | None) -> Tree | None:
    """The options of an objective, if all of them are numbers, words or dicts of numbers."""
    if objective is None:
        return None
    options = {f.name: getattr(objective, f.name) for f in fields(objective) if f.init}
    for value in options.values():
        parts = value.values() if isinstance(value, Mapping) else [value]
        if not all(isinstance(part, PLAIN) for part in parts):
            return None
    return options


def _objective(options: Tree | None, path: Path) -> Objective | None:
    try:
        return None if options is None else Objective(**options)
    except TypeError as error:
        raise CheckpointError(f"{path} has other options of an objective: {error}") from None
