"""Draw activations in the place of weights, where a training objective allows it.

A module $f(x; w)$ in a model needs no draw of $w$ for its likelihood: with $w \\sim N(m, s^2)$ the
activations of each datum are normal too, and a draw of their own for each has far less variance
(Kingma, Salimans, Welling 2015). Flipout gives each datum a perturbation of its own from one draw
(Wen et al. 2018). Either way each datum's activations have the distribution that they have under
$q(w)$, so that the mean of its log likelihood is the same; the weights are drawn and weighed as
ever.

`local_reparam` allows it. The model sends a `Request` for the normals at its sites; the engine
answers in the training runs of an ELBO alone, so all else sees the draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import apply_stack
from torch import Tensor
from torch.distributions import Independent, Normal

from pvi.errors import ModelError

TYPE = "pvi_local"
KINDS = ("local", "flipout")
Program = Callable[..., Any]


@dataclass
class Request:
    """What a model asks of the guide, and what it made of the answer.

    Args:
        names: sites at which it could do with the guide's distribution.

    Attributes:
        kind: what the user wants, "local" or "flipout"; `None` without `local_reparam` around.
        normals: mean and scale of the guide, `(*batch, *event)`, of sites that need no draw.
        how: what the model does with each site, "local" or "flipout"; else "sampled: why".
        notes: what else `explain` should say.
    """

    names: Sequence[str]
    kind: str | None = None
    normals: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def request(names: Sequence[str]) -> Request:
    """Ask for the guide's normals at these sites, all of which have been sampled before.

    Not all that is asked for is answered, and without an objective around nothing is. A model that
    uses the normals of a site must give every datum activations of the same distribution as its
    draws would, independent between the site's elements.
    """
    asked = Request(names)
    message: Any = {
        "type": TYPE,
        "name": TYPE,
        "fn": None,
        "args": (),
        "kwargs": {},
        "value": asked,
        "is_observed": False,
        "scale": 1.0,
        "mask": None,
        "cond_indep_stack": (),
        "done": True,
        "stop": False,
        "continuation": None,
        "infer": {},
    }
    apply_stack(message)
    return asked


class _Allowed(Messenger):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == TYPE and msg["value"].kind is None:
            msg["value"].kind = self.kind


class LocalReparam:
    """A model whose networks may draw activations in the place of weights; see `local_reparam`.

    Attributes are those of the model, as of a bound method those of its function.
    """

    def __init__(self, model: Program, kind: str):
        update_wrapper(self, model, updated=())
        self.kind = kind
        if isinstance(model, torch.nn.Module):
            self.__self__ = model  # a method of the module: its parameters are the program's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Allowed(self.kind):
            return self.__wrapped__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)


def local_reparam(model: Program, *, kind: str = "local") -> Any:
    """The model with activations drawn in the place of weights, in the training of an ELBO.

    For weights $w \\sim N(m, s^2)$ of a linear layer that a datum passes once, "local" draws

    $$h = m^\\top x + \\sqrt{(s^2)^\\top x^2}\\;\\epsilon, \\qquad \\epsilon \\sim N(0, I)$$

    for each datum (Kingma, Salimans, Welling 2015, eq. 6). Convolutions and layers that a datum
    passes at several positions share one draw of the weights among these, which noise of their own
    would deny; there, and everywhere with "flipout", each datum has random signs $r, t$ around one
    draw $w$ (Wen et al. 2018, eq. 4):

    $$h = m^\\top x + r \\circ \\left((w - m)^\\top (t \\circ x)\\right).$$

    The bound is the same in the mean, and its gradient has less variance. Weights for which neither
    is right, and all weights where an objective weighs draws (`pvi.IWAE`), are sampled; the same in
    predictions, log weights, evidence and diagnoses. `pvi.ELBO().explain(model, guide, ...)` tells
    which.

    Args:
        model: a model that asks for it, such as those of `pvi.models.bnn.bayesianize`.
        kind: "local" or "flipout".

    Raises:
        ModelError: another kind, or no program.
    """
    if kind not in KINDS:
        raise ModelError(f"kind must be 'local' or 'flipout', got {kind!r}")
    if not callable(model):
        raise ModelError(f"model must be a Pyro program, got {type(model).__name__}")
    return LocalReparam(model, kind)


def normal_of(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and scale of independent normals; `None` for any other distribution."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return (fn.loc, fn.scale) if isinstance(fn, Normal) else None


def answer(asked: Request, nodes: Mapping[str, Any], allowed: Mapping[str, str]) -> None:
    """Put in the guide's normals at the sites for which `allowed` says no "sampled"."""
    if asked.kind is None:
        return
    for name in asked.names:
        if name in nodes and allowed.get(name, "sampled").split(":")[0] in KINDS:
            found = normal_of(nodes[name]["fn"])
            if found is not None:
                asked.normals[name] = found
