"""`Adversary`: a network that tells two kinds of samples apart, and the penalty that it gives."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu, softplus

from pvi.engine.effects import penalty
from pvi.engine.schedules import Unit
from pvi.errors import FitError, ModelError
from pvi.fit.arguments import made_optimizer

Factory = Callable[[list], torch.optim.Optimizer]
Real = Tensor | Callable[[Tensor], Tensor]

NOT_GIVEN = (
    "the program calls the adversary '{0}', which this fit was not given: pass adversaries=[...], "
    "with weight=0 if it is to have no effect"
)
PLAYERS: ContextVar[Mapping["Adversary", bool] | None] = ContextVar("players", default=None)


@dataclass(frozen=True)
class Game:
    """The two losses of an adversarial game, elementwise in the network's scores.

    Args:
        real, fake: what the network minimises at scores of real and of fake samples; half of the
            sum of their means is its own loss.
        term: what the program minimises at scores of fakes.
    """

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    term: Callable[[Tensor], Tensor]


GAMES = {
    "hinge": Game(lambda s: relu(1.0 - s), lambda s: relu(1.0 + s), torch.neg),
    "ratio": Game(lambda s: softplus(-s), softplus, torch.neg),
    "logistic": Game(lambda s: softplus(-s), softplus, lambda s: softplus(-s)),
    "squares": Game(lambda s: (s - 1.0) ** 2, torch.square, lambda s: 0.5 * (s - 1.0) ** 2),
}


class Adversary:
    """A network that scores samples, trained against a program in the steps of one fit.

    Call it in the model (or the guide) inside the plate of the data, and give it to the fit::

        adversary = pvi.Adversary(network, event_dim=3)

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", ...)
                adversary(decoder(z), x)
                pyro.sample("x", ..., obs=x)

        pvi.fit(model, guide, x, adversaries=[adversary], epochs=50)

    In a step of that fit the call is `pvi.penalty(name, weight * term(score of fake))`, a loss for
    each datum, besides the bound and never part of it. Its gradient reaches the fakes but not the
    network. After the step the network takes one of its own, with its own optimiser, on the same
    samples, detached: it minimises $\\frac12 E[\\ell_1(s(\\mathrm{real}))] + \\frac12
    E[\\ell_0(s(\\mathrm{fake}))]$ in its score s. By `loss`:

    - "hinge": $\\ell_1 = \\max(0, 1-s)$, $\\ell_0 = \\max(0, 1+s)$, term $-s$
    - "ratio": softplus(-s), softplus(s), term $-s$, at best the log of density fake / real
    - "logistic": softplus(-s), softplus(s), term softplus(-s), the non-saturating one
    - "squares": $(s-1)^2$, $s^2$, term $\\frac12 (s-1)^2$

    Outside of fits, and in their validation and looks at the program, it does nothing. It is no
    module: what holds it does not hold the parameters of its network.

    Args:
        network: from `(n, *event)` to scores `(n, *any)`, such as those of patches of an image.
        name: of the penalty and in the history: `adversary/NAME/loss` is that of the network,
            `adversary/NAME/term` the mean of the term over data, without its weight, and
            `adversary/NAME/weight` its weight, 0 before the start.
        loss: "hinge", "ratio", "logistic", "squares", or a `pvi.fit.Game`.
        weight: of the term of one datum beside its bound in nats; with 0 the network only watches.
        adaptive: a parameter, such as the weight of the decoder's last layer, at which the gradient
            of the term gets `weight` times the norm of that of all the rest (at most 1e4 times its
            own), batch by batch.
        start: steps or epochs before which the adversary does not take part at all.
        unit: of `start`, "step" or "epoch".
        event_dim: how many dimensions one sample has: 1 for vectors, 3 for images.
        lr: rate of Adam with betas 0.5 and 0.9.
        optimizer: in its place, a callable from a list of parameters to a `torch.optim.Optimizer`.
        clip_norm: longest gradient of the network.

    Raises:
        FitError: options that make no sense.

    Reference:
        Goodfellow et al. (2014), logistic; Mao et al. (2017), squares; Lim and Ye (2017), hinge;
        Kim and Mnih (2018), ratio; Esser et al. (2021), equation 7, adaptive.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str = "adversary",
        loss: str | Game = "hinge",
        weight: float = 1.0,
        adaptive: Tensor | None = None,
        start: int = 0,
        unit: Unit = "step",
        event_dim: int = 1,
        lr: float = 1e-3,
        optimizer: Factory | None = None,
        clip_norm: float | None = None,
    ):
        self.network, self.name, self.loss, self.weight = network, name, loss, weight
        self.adaptive, self.start, self.unit, self.event_dim = adaptive, start, unit, event_dim
        self.lr, self.optimizer, self.clip_norm = lr, optimizer, clip_norm
        self._seen: list[tuple[Tensor, Real]] = []
        self._check()
        self._game = GAMES[loss] if isinstance(loss, str) else loss

    def __call__(self, fake: Tensor, real: Real) -> None:
        """Show samples, and add the penalty where a fit is training with this adversary.

        Args:
            fake: samples of the program, `(*plates, *event)`.
            real: what they are to be like, `(*any, *event)`; or a function that makes that of the
                fakes `(n, *event)` without their gradients, when the network takes its step.

        Raises:
            FitError: the fit was not given this adversary.
            ModelError: shapes that don't fit each other.
        """
        players = PLAYERS.get()
        if players is None or not torch.is_grad_enabled():
            return
        if self not in players:
            raise FitError(NOT_GIVEN.format(self.name))
        if not players[self]:
            return
        event = fake.shape[fake.dim() - self.event_dim :]
        seen = fake if callable(real) else real
        if fake.dim() < self.event_dim or seen.shape[seen.dim() - self.event_dim :] != event:
            raise ModelError(
                f"adversary '{self.name}' with event_dim={self.event_dim} got fakes of shape "
                f"{tuple(fake.shape)} and real samples of shape {tuple(seen.shape)}; their last "
                f"{self.event_dim} dimensions must be the same. Give event_dim= the number of "
                "dimensions of one sample."
            )
        self._seen.append((fake.detach(), real if callable(real) else real.detach()))
        if self.weight:
            scores = self.scores(self._flat(fake), frozen=True)
            terms = self._game.term(scores).flatten(1).mean(1).to(fake)
            penalty(self.name, self.weight * terms.reshape(fake.shape[: fake.dim() - len(event)]))

    def scores(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        """The network's scores of samples, `(n, *any)`.

        Args:
            x: `(n, *event)`, in any precision: it is taken to the network's.
            frozen: without gradients for the network's parameters, and without a change to its
                buffers.
        """
        x = x.to(next(self.network.parameters()))
        if not frozen:
            return _at_least_2d(self.network(x))
        fixed = {k: p.detach() for k, p in self.network.named_parameters()}
        fixed |= {k: b.detach().clone() for k, b in self.network.named_buffers()}
        return _at_least_2d(functional_call(self.network, fixed, (x,)))

    def losses(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The network's own loss, and the mean of the term without its weight.

        Args:
            fake, real: `(n, *event)`.
        """
        game, real_scores, fake_scores = self._game, self.scores(real), self.scores(fake)
        own = 0.5 * (game.real(real_scores).mean() + game.fake(fake_scores).mean())
        return own, game.term(fake_scores.detach()).mean()

    def seen(self) -> tuple[Tensor, Tensor]:
        """Fakes and real samples of the last step, `(n, *event)`, in the network's own dtype.

        Raises:
            ModelError: none were shown.
        """
        if not self._seen:
            raise ModelError(
                f"adversary '{self.name}' was given to the fit but saw nothing. Call it in the "
                "model inside the plate of the data: adversary(fake, real)."
            )
        like = next(self.network.parameters())
        fake = torch.cat([self._flat(fake) for fake, _ in self._seen]).to(like)
        made = [real(fake) for _, real in self._seen[:1] if callable(real)]
        real = made or [self._flat(x) for _, x in self._seen if isinstance(x, Tensor)]
        return fake, torch.cat(real).to(like)

    def forget(self) -> None:
        """Drop the samples of the last step."""
        self._seen = []

    def made_optimizer(self) -> torch.optim.Optimizer:
        """A new optimiser over the network.

        Raises:
            FitError: `optimizer` makes none.
        """
        leaves = list(_leaves(self.network))
        if self.optimizer is None:
            return torch.optim.Adam(leaves, lr=self.lr, betas=(0.5, 0.9))
        return made_optimizer(self.optimizer, leaves, leaves)

    def described(self) -> list[Any]:
        """What decides its part in a fit, as plain data."""
        loss = self.loss if isinstance(self.loss, str) else "given"
        shapes = [list(p.shape) for p in self.network.parameters()]
        rest = [self.start, self.unit, self.clip_norm, self.lr, self.optimizer is not None]
        return [self.name, loss, self.weight, self.adaptive is not None, *rest, shapes]

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[x.dim() - self.event_dim :])

    def _check(self) -> None:
        who = f"adversary '{self.name}'"
        if not isinstance(self.network, nn.Module) or not any(True for _ in _leaves(self.network)):
            raise FitError(f"{who} needs a network with parameters, got {self.network!r}")
        if not (self.loss in GAMES if isinstance(self.loss, str) else isinstance(self.loss, Game)):
            raise FitError(
                f"{who}: loss must be one of {sorted(GAMES)} or a Game, got {self.loss!r}"
            )
        for name in ("weight", "start", "lr", "clip_norm"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and 0 <= value < math.inf
            if not number and not (name == "clip_norm" and value is None):
                raise FitError(f"{who}: {name} must be a finite number >= 0, got {value!r}")
        if self.unit not in ("step", "epoch"):
            raise FitError(f"{who}: unit must be 'step' or 'epoch', got {self.unit!r}")
        if self.adaptive is not None and not isinstance(self.adaptive, Tensor):
            raise FitError(
                f"{who}: adaptive must be a parameter of a program, got {self.adaptive!r}"
            )


@contextmanager
def playing(players: Mapping[Adversary, bool]) -> Iterator[None]:
    """Inside, programs take the steps of a fit.

    Args:
        players: its adversaries, and whether they have started.
    """
    token = PLAYERS.set(players)
    try:
        yield
    finally:
        PLAYERS.reset(token)


def _leaves(network: nn.Module) -> Iterable[Tensor]:
    return (p for p in network.parameters() if p.requires_grad)


def _at_least_2d(scores: Tensor) -> Tensor:
    return scores if scores.dim() > 1 else scores.unsqueeze(-1)
