"""What all models of the family can do: fit, encode, decode, draw, evaluate, save."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import pyro
import torch
from torch import Tensor

import pvi
from pvi.engine.traces import preserved_rng
from pvi.errors import DataError, FitError
from pvi.models.saving import Saved
from pvi.models.vae.alarm import with_alarm
from pvi.models.vae.likelihoods import Likelihood

ROWS = 1024  # in a batch of what is not trained


class LatentVariableModel(Saved):
    """A model $p(x \\mid z)\\, p(z)$ of data of one shape, and its guide $q(z \\mid x)$.

    Both are Pyro programs of a batch, the tensors that `rows` makes of data, for `pvi.fit` or
    anything else that takes programs. The methods are those of scikit-learn's estimators.

    Attributes:
        model, guide: the programs $p(x, z)$ and $q(z \\mid x)$ of a batch.
        shape: of a datum.
        likelihood: of a datum, given what is decoded.
        fit_: the `pvi.Fit` of the last call of `fit`.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    shape: tuple[int, ...]
    likelihood: Likelihood
    fit_: pvi.Fit | None = None

    @abstractmethod
    def encode(self, X: Any, y: Any = None) -> Tensor:
        """Posterior means of the latents, `(N, d)`.

        Args:
            X, y: data, as in `fit`.
        """

    @abstractmethod
    def decode(self, z: Any, y: Any = None) -> Tensor:
        """Means of the data, given latents.

        Args:
            z: `(N, d)`.
            y: as in `fit`.

        Returns:
            `(N, *shape)`.
        """

    def objective(self) -> pvi.Objective:
        """What `fit` maximises if it is not told: the ELBO with exact KLs where they exist."""
        return pvi.TraceMeanFieldELBO()

    def fit(self, X: Any, y: Any = None, *, batch_size: int = 128, **options: Any) -> Self:
        """Train on data; the result is the attribute `fit_`.

        Args:
            X: `(N, *shape)`, or another form of data that `pvi.fit` takes.
            y: what else belongs to a datum, for models that have more.
            batch_size, options: as of `pvi.fit`, such as objective, epochs, lr, seed.

        Raises:
            DataError: X has another shape or elements outside of the likelihood's support.
        """
        if y is not None and not is_array(X):
            raise DataError("y goes with an array X; a data set or a tuple holds both")
        if not self.training:
            self.train()  # else dropout would be off, and running means would stay
        options.setdefault("objective", self.objective())
        data = self.rows(X, y) if is_array(X) else X
        found = pvi.fit(self.model, self.guide, data, batch_size=batch_size, **options)
        watched = getattr(getattr(self, "likelihood", None), "watched", False)
        self.fit_ = with_alarm(found) if watched else found
        return self

    def reconstruct(self, X: Any, y: Any = None) -> Tensor:
        """Means of the data, given the posterior means of their latents: `(N, *shape)`.

        Args:
            X, y: data, as in `fit`.
        """
        return self.decode(self.encode(X, y), y)

    def sample(
        self, num_samples: int = 1, *given: Any, mean: bool = False, seed: int | None = None
    ) -> Tensor:
        """New data from the model, `(num_samples, *shape)`.

        Args:
            num_samples: how many.
            given: for models of data with something else, that of each new datum.
            mean: their means, given their latents, as pictures are usually shown.
            seed: makes it repeatable.
        """
        with self.evaluating(seed):
            fn = self.prior_predictive(num_samples, *given)
            return self.likelihood.mean(fn) if mean else fn.sample()

    @abstractmethod
    def prior_predictive(self, num_samples: int, *given: Any) -> Any:
        """The distributions of data given latents drawn from the prior, `(num_samples)` of them."""

    def score_samples(
        self,
        X: Any,
        y: Any = None,
        *,
        num_samples: int = 1000,
        seed: int | None = None,
        **options: Any,
    ) -> pvi.Evidence:
        """Log evidence of each datum by importance sampling, nats, with its standard error.

        Args:
            X, y: data, as in `fit`.
            num_samples: draws for each.
            seed: makes it repeatable.
            options: as of `pvi.evidence`.

        Returns:
            `log_evidence` and `se` `(N,)`, and whether to rely on them.
        """
        rows = self.rows(X, y)
        return pvi.evidence(
            self.model, self.guide, *rows, num_samples=num_samples, seed=seed, **options
        )

    def score(self, X: Any, y: Any = None, *, num_samples: int = 1000) -> float:
        """Mean log evidence of a datum, nats.

        Args:
            X, y, num_samples: as of `score_samples`.
        """
        found = self.score_samples(X, y, num_samples=num_samples, seed=0)
        return float(found.log_evidence.mean())

    def rows(self, X: Any, y: Any = None) -> tuple[Tensor, ...]:
        """The programs' arguments for data of `fit`.

        Raises:
            DataError: they do not fit the model.
        """
        return (self.data(X),)

    def data(self, X: Any) -> Tensor:
        """Data as a tensor that fits the model.

        Raises:
            DataError: as of `fit`.
        """
        x = self.numbers(X, "X")
        if tuple(x.shape[1:]) != self.shape or not len(x):
            raise DataError(
                f"X must have shape (N, {', '.join(map(str, self.shape))}) with N >= 1, got "
                f"{tuple(x.shape)}"
            )
        self.check(x)
        return x

    def numbers(self, values: Any, name: str) -> Tensor:
        """Numbers in the precision and on the device of the parameters.

        Args:
            values: a tensor or what numpy makes an array of.
            name: of the argument.

        Raises:
            DataError: they are no numbers.
        """
        like = next(self.parameters(), torch.empty(()))
        if not isinstance(values, Tensor):
            values = np.require(values, requirements="W")  # torch warns of what is read-only
        if isinstance(values, np.ndarray) and values.dtype.kind not in "biuf":
            raise DataError(f"{name} must hold numbers, got an array of {values.dtype}")
        return torch.as_tensor(values).to(like).contiguous()  # columns first round otherwise

    def check(self, x: Tensor) -> None:
        """Refuse data that the model gives no density.

        Raises:
            DataError: as of `fit`.
        """
        self.likelihood.check(x)

    def in_batches(
        self, function: Callable[..., Tensor], *arrays: Tensor, seed: int | None = 0
    ) -> Tensor:
        """A function of rows, on some at a time, without gradients and in evaluation mode.

        It draws the same random numbers each time, where it draws any, unless `seed` is `None`.
        """
        with self.evaluating(seed):
            parts = zip(*(x.split(ROWS) for x in arrays), strict=True)
            return torch.cat([function(*part) for part in parts])

    @contextmanager
    def evaluating(self, seed: int | None) -> Iterator[None]:
        """Inside: evaluation mode, no gradients, random numbers of a seed of one's own."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad(), nullcontext() if seed is None else preserved_rng():
                if seed is not None:
                    torch.manual_seed(seed)
                yield
        finally:
            for module, training in modes:
                module.training = training

    def result(self) -> pvi.Fit:
        """The last fit.

        Raises:
            FitError: there is none.
        """
        if self.fit_ is None:
            raise FitError("this model was not fitted here: call fit first")
        return self.fit_

    def registered(self) -> None:
        """Tell Pyro of the parameters; to be called in both programs."""
        with warnings.catch_warnings():  # of Pyro's, on parameters that are frozen on purpose
            warnings.filterwarnings("ignore", ".*requires_grad=False")
            pyro.module(type(self).__name__.lower(), self)


def is_array(x: Any) -> bool:
    """Whether it is one array, rather than a data set or a loader."""
    return hasattr(x, "shape") or isinstance(x, list)
