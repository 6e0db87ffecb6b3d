"""The adversaries of one fit: the weights of their terms and their own steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from pvi.engine.objective import Evaluation
from pvi.engine.terms import Terms
from pvi.engine.traces import preserved_rng
from pvi.errors import FitError, ModelError, ObjectiveError
from pvi.fit.adversary import Adversary, playing
from pvi.fit.faults import SHOWN, total_norm
from pvi.fit.storage import Tree

MOST = 1e4  # an adaptive weight, relative to the term's own gradient
NO_END = "a fit with adversaries plays a game: no level of its loss says that it has ended"


def check_adversaries(adversaries: Any, steps: Any, epochs: Any, alone: bool) -> None:
    """Refuse what can't take part in a fit, before anything is run.

    Raises:
        FitError: naming the adversary or argument.
    """
    if isinstance(adversaries, Adversary) or not isinstance(adversaries, Sequence):
        raise FitError(f"adversaries must be a list of pvi.Adversary, got {adversaries!r}")
    for one in adversaries:
        if not isinstance(one, Adversary):
            raise FitError(f"adversaries must hold pvi.Adversary, got {one!r} among them")
    names = [one.name for one in adversaries]
    if len({*names}) < len(names):
        raise FitError(f"two adversaries have one name among {names}; give each its own name=")
    if adversaries and steps is None and epochs is None:
        raise FitError(
            "a fit with adversaries can't tell its end from its loss: give steps= or epochs="
        )
    if adversaries and not alone:
        raise FitError("adversaries take their steps in one process: run without torchrun")


class Arena:
    """What the adversaries of a fit do in its steps.

    Args:
        adversaries: any number, also none.
        task: the fit's trainer.

    Raises:
        FitError: the programs hold an adversary's network, whose parameters both would train.
    """

    def __init__(self, adversaries: Sequence[Adversary], task: Any):
        self.adversaries, self._task = adversaries, task
        self.notes: list[str] = []
        self._seed, self._left_out = torch.initial_seed(), 0
        if adversaries:
            self._check_apart()
            for leaf in list(task.params.named().values())[:1]:
                for one in adversaries:
                    one.network.to(leaf.device)
        self._optimizers = [one.made_optimizer() for one in adversaries]

    @property
    def caveats(self) -> tuple[str, ...]:
        """What the fit's posterior has to say of them; those that only watched change nothing."""
        names = ", ".join(f"'{one.name}'" for one in self.adversaries if one.weight)
        return (CAVEAT.format(names),) if names else ()

    @contextmanager
    def playing(self, step: int) -> Iterator[None]:
        """Inside, the adversaries that have started by this step take part in the programs."""
        started = self._started(step)
        with playing({one: one in started for one in self.adversaries}):
            yield

    def weighed(self, value: Evaluation, step: int) -> Evaluation:
        """An evaluation with adaptive weights in its loss, and all weights in its record.

        Args:
            value: of the objective inside `playing`.
            step: as there.
        """
        if not self.adversaries or not torch.is_grad_enabled():
            return value
        started, weights, more = self._started(step), {}, torch.zeros(())
        terms = {term.name: term for term in value.terms.penalties}
        for one in self.adversaries:
            weight = value.loss.new_tensor(one.weight if one in started else 0.0)
            if one.adaptive is not None and one in started and one.name in terms:
                check_pathwise(one, value.terms)
                term = -terms[one.name].per_particle().mean()
                ratio = balance(one, value.loss - term, term / one.weight)
                more, weight = more + (ratio - 1.0) * term, weight * ratio
            weights[f"adversary/{one.name}/weight"] = weight
        return replace(value, loss=value.loss + more, parts={**value.parts, **weights})

    def begin(self) -> None:
        """Drop the samples of the step before."""
        for one in self.adversaries:
            one.forget()

    def step(self, step: int) -> dict[str, float]:
        """The adversaries' own steps, after one of the fit; what is recorded of them.

        The draws that they need are none of the fit's: with an adversary of weight 0 it is bit by
        bit the fit without.

        Args:
            step: how many were done before.
        """
        record: dict[str, float] = {}
        for one in self._started(step):
            with preserved_rng():
                torch.manual_seed((self._seed + step) % 2**63)
                own, term = one.losses(*one.seen())
            one.forget()
            self._update(one, own, step)
            loss, mean = torch.stack([own.detach(), term.to(own)]).tolist()
            record |= {f"adversary/{one.name}/loss": loss, f"adversary/{one.name}/term": mean}
        return record

    def state(self) -> Tree | None:
        """Networks and optimisers as they are, as plain data."""
        if not self.adversaries:
            return None
        return {
            "seed": self._seed,
            "left_out": self._left_out,
            "notes": list(self.notes),
            "networks": [_copied(one.network.state_dict()) for one in self.adversaries],
            "optimizers": [deepcopy(optimizer.state_dict()) for optimizer in self._optimizers],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state`."""
        self._seed, self._left_out = state["seed"], state["left_out"]
        self.notes = list(state["notes"])
        for one, network in zip(self.adversaries, state["networks"], strict=True):
            one.network.load_state_dict(network)
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(deepcopy(saved))

    def _started(self, step: int) -> list[Adversary]:
        epoch = step / self._task.steps_per_epoch if self.adversaries else 0.0
        time = {"step": step, "epoch": epoch}
        return [one for one in self.adversaries if time[one.unit] >= one.start]

    def _update(self, one: Adversary, own: Tensor, step: int) -> None:
        """One step of a network, or none where its numbers are not finite."""
        optimizer = self._optimizers[self.adversaries.index(one)]
        optimizer.zero_grad()
        own.backward()
        leaves = [p for p in one.network.parameters() if p.grad is not None]
        norm = total_norm([p.grad for p in leaves if p.grad is not None])
        if not bool((norm + own.detach()).isfinite()):
            self._left_out += 1
            if self._left_out <= SHOWN:
                self.notes.append(
                    f"step {step + 1}: the loss or gradient of adversary '{one.name}' is not "
                    "finite; its own step was left out"
                )
            return
        if one.clip_norm is not None:
            clip_grads_with_norm_(leaves, one.clip_norm, norm)
        optimizer.step()

    def _check_apart(self) -> None:
        trained = {id(x): name for name, x in self._task.params.named().items()}
        for one in self.adversaries:
            shared = [trained[id(p)] for p in one.network.parameters() if id(p) in trained]
            if shared:
                raise FitError(
                    f"parameter '{shared[0]}' belongs to a program and to the network of adversary "
                    f"'{one.name}', which is trained against it. Keep the network out of the "
                    "programs' modules: hold the pvi.Adversary there, which is none."
                )


def balance(one: Adversary, rest: Tensor, term: Tensor) -> Tensor:
    """How many times larger the gradient of the rest is than that of a term, at `adaptive`.

    $$\\|\\nabla_\\theta \\mathrm{rest}\\| / \\|\\nabla_\\theta \\mathrm{term}\\|$$

    Args:
        rest: the loss without the term.
        term: the adversary's, without its weight.

    Reference:
        Esser et al. (2021), Taming Transformers, equation 7; at most `MOST`, as in their code.
    """
    leaf = one.adaptive
    found = []
    for x in (rest, term):
        if leaf is not None and x.requires_grad:
            found += torch.autograd.grad(x, leaf, retain_graph=True, allow_unused=True)
    if len(found) < 2 or any(grad is None for grad in found):
        raise ModelError(
            f"adversary '{one.name}': the loss and the adversary's term must both depend on the "
            "parameter given as adaptive=; give that of the last layer before the fakes."
        )
    ours, its = (torch.linalg.vector_norm(grad) for grad in found)
    return (ours / its.clamp_min(torch.finfo(its.dtype).tiny)).clamp_max(MOST)


def check_pathwise(one: Adversary, terms: Terms) -> None:
    """Refuse an adaptive weight where part of the term's gradient is one of scores.

    Raises:
        ObjectiveError: naming the site.
    """
    for term in terms:
        if term.kind != "likelihood" and not term.reparameterized:
            raise ObjectiveError(
                f"adversary '{one.name}' can't be adaptive beside site '{term.name}', whose draws "
                "carry no gradient. Use a reparameterised guide, or a fixed weight."
            )


def _copied(state: Mapping[str, Any]) -> Tree:
    return {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in state.items()}


CAVEAT = (
    "besides the bound the adversaries {} shaped model and guide, so the objective is not a bound; "
    "history['bound'] is the plain one"
)
