"""What is no error, but worth a look before the first fit."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pvi.engine.checks import is_real
from pvi.engine.traces import density

FAR = 10.0  # means so many standard deviations from 0 are hard for optimisers
LARGE, SMALL = 1e3, 1e-3  # standard deviations that the usual priors and rates are not made for
UNLIKELY = 1e3  # nats a value
SHOWN = 4  # columns of one argument
MIN_ROWS = 8  # from which means and sds are worth a word


def hints(named: Mapping[str, Any], nodes: Mapping[str, Mapping]) -> Iterator[str]:
    """Hints on the data arguments, and on the model's observed sites."""
    observed = {n: x for n, x in nodes.items() if x["is_observed"] and x["value"].numel() > 0}
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            yield from _scales(name, value)
            yield from _dtype(name, value)
    for name, node in observed.items():
        yield from _counts(name, node)
        yield from _likelihood(name, node)


def _scales(name: str, value: Tensor) -> Iterator[str]:
    """Columns far from 0 for their spread, of an extreme spread, or of none."""
    if len(value) < MIN_ROWS or value.dim() > 2:
        return
    columns = value.double().reshape(len(value), -1)
    columns = torch.where(columns.isfinite(), columns, columns.nanmean(0))
    means, sds = columns.mean(0), columns.std(0)
    flat = sds <= 1e-12 * (1 + means.abs())
    labels = [name if value.dim() == 1 else f"{name}[:, {i}]" for i in range(columns.shape[1])]
    far = (~flat & (means.abs() > FAR * sds)).nonzero()[:, 0].tolist()
    wide = (~flat & ((sds > LARGE) | (sds < SMALL))).nonzero()[:, 0].tolist()
    for i in far[:SHOWN]:
        yield (
            f"{labels[i]} has mean {means[i]:.4g} and sd {sds[i]:.3g}: subtract the mean, or an "
            "intercept and a slope will be hard to tell apart"
        )
    for i in [i for i in wide if i not in far][:SHOWN]:
        yield f"{labels[i]} has sd {sds[i]:.3g}: divide by it, or choose priors of that scale"
    ones = flat.nonzero()[:, 0].tolist() if value.dim() == 2 else []
    if len(ones) > 1:
        yield f"{len(ones)} columns of {name} are constant ({_some(labels[i] for i in ones)})"
    more = max(len(far) - SHOWN, 0)
    if more:
        yield f"{name}: {more} more columns have a mean beyond {FAR:g} sds"


def _some(labels: Iterable[str]) -> str:
    listed = list(labels)
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")


def _dtype(name: str, value: Tensor) -> Iterator[str]:
    default = torch.get_default_dtype()
    if value.dtype != default:
        yield (
            f"{name} is {_short(value.dtype)} where torch's default is {_short(default)}: convert "
            "one of them, for speed and for products of matrices"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _counts(name: str, node: Mapping) -> Iterator[str]:
    """Whole numbers under a density on the real line."""
    value = node["value"]
    try:
        continuous = is_real(node["fn"].support)
    except NotImplementedError:
        return
    whole = not value.is_floating_point() or bool((value == value.round()).all())
    if continuous and whole and value.numel() >= MIN_ROWS and value.unique().numel() > 1:
        yield (
            f"observed site '{name}' holds whole numbers only: if they are counts or labels, use "
            "Poisson, NegativeBinomial, Bernoulli or Categorical"
        )


def _likelihood(name: str, node: Mapping) -> Iterator[str]:
    log_prob = density(node).log_prob()
    mean = float(log_prob.double().mean())
    if mean < -UNLIKELY:
        yield (
            f"observed site '{name}' has a log density of {mean:.3g} nats a value at the start: "
            "the priors, or the guide's start, and the data have different scales"
        )
