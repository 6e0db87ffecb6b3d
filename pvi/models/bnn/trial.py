"""Which layers of a network may draw activations instead of weights: found by trying.

It is right where the weight is read once, by the layer itself, and by nothing else. That can't be
seen from outside (`nn.MultiheadAttention` reads the weight of its `out_proj` past it), so the
network is run with NaN in the weight of a layer whose output is put right afterwards: it must not
notice.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pvi.models.bnn.layers import Hook, Layer

ROWS = (2, 3)  # of data, to see which dimension of a layer's input follows them

Run = Callable[[int, Mapping[str, Tensor], Mapping[str, Hook]], Tensor]


def tried(layers: Sequence[Layer], run: Run) -> dict[str, str]:
    """For the name of each layer "local", "flipout" (also where "local" is not right), or
    "sampled: why".

    Args:
        run: the network's output on so many rows, with other values of some parameters and hooks
            on some layers; always with the same random numbers.
    """
    how = {x.name: "" for x in layers}
    shapes: dict[str, list[torch.Size]] = {x.name: [] for x in layers}

    def noted(name: str, x: Tensor, output: Tensor) -> Tensor:
        shapes[name].append(x.shape)
        return output

    watch = {x.name: partial(noted, x.name) for x in layers}
    outputs = [run(rows, {}, watch) for rows in ROWS]
    for layer in layers:
        how[layer.name] = _seen(layer, shapes[layer.name])
    left = [x for x in layers if not how[x.name].startswith("sampled")]
    if left and not _unnoticed(left, run, outputs[-1]):
        for layer in left:
            if not _unnoticed([layer], run, outputs[-1]):
                how[layer.name] = "sampled: its weight is read past the layer"
    return how


def _seen(layer: Layer, shapes: Sequence[torch.Size]) -> str:
    """How a layer may be treated, by the shapes of the inputs that it was given."""
    if len(shapes) != len(ROWS):
        count = len(shapes) / len(ROWS)
        return f"sampled: its layer runs {count:g} times"
    linear, weight = isinstance(layer.module, nn.Linear), layer.tensor
    depth = len(shapes[0])
    wanted = depth >= 2 if linear else depth == weight.dim()
    follows = all(len(s) and s[0] == rows for s, rows in zip(shapes, ROWS, strict=True))
    if not wanted or not follows:
        return "sampled: rows of data are not the first dimension of its layer's input"
    return "local" if linear and depth == 2 else "flipout"


def _unnoticed(layers: Sequence[Layer], run: Run, expected: Tensor) -> bool:
    """Whether the network's output is the same where only the layers know their weights."""
    hooks, poison = {}, {}
    for layer in layers:
        bias: Any = layer.module.bias
        hooks[layer.name] = partial(_put_right, layer, layer.tensor, bias)
        for name, x in ((layer.weight, layer.tensor), (layer.bias, bias)):
            if name is not None:
                poison[name] = torch.full_like(x, torch.nan)
    found = run(ROWS[-1], poison, hooks)
    return bool(expected.isfinite().all()) and torch.allclose(found, expected)


def _put_right(layer: Layer, weight: Tensor, bias: Any, x: Tensor, output: Tensor) -> Tensor:
    return layer.apply(x, weight, bias)
