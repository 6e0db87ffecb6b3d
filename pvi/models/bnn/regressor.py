"""Bayesian neural networks of one number as scikit-learn's estimators."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import pyro.distributions as dist
import torch
from sklearn.base import RegressorMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from pvi.errors import FitError
from pvi.models.bnn.base import BNN
from pvi.models.bnn.fitted import Fitted, Units
from pvi.models.bnn.likelihoods import Gaussian, Likelihood, with_prior
from pvi.models.bnn.linear import best_linear_posterior
from pvi.models.bnn.metrics import Uncertainty, mixture_log_likelihood, variance_uncertainty
from pvi.models.bnn.predictive import as_numpy, for_members

HEADS = {"gaussian": None, "heteroscedastic": "decoded"}  # -> scale of `Gaussian`


def _learns_on(model: Any) -> bool:
    """Whether `partial_fit` is there: scikit-learn's `available_if` asks."""
    if model.last_layer:
        raise AttributeError(
            "partial_fit with last_layer='exact' would forget all earlier rows: the exact layer is "
            "that of the rows at hand. Give last_layer=None, or fit all rows at once"
        )
    return True


class BNNRegressor(RegressorMixin, BNN):
    """A Bayesian neural network of one number, as a scikit-learn estimator.

    Inputs and targets are standardised by the means and sds of the training rows; everything that
    is returned is in original units. Predictions are those of the mixture of `num_draws` networks
    drawn from a mean-field posterior.

    Args:
        hidden: units of each hidden layer.
        activation: of `pvi.nn.MLP`.
        network: a module of one's own in their place, from `(N, d)` to `(N, 1)`, or to `(N, 2)` if
            heteroscedastic; it is not changed, and its weights are drawn anew.
        prior: of the weights, as in `bayesianize`; `FanIn()` by default.
        likelihood: "gaussian" with one learned noise, "heteroscedastic" with one from the network
            for each row, or a likelihood of `pvi.models.bnn`, such as `Poisson()`.
        kl_weight: weight of the KL. Below 1 the posterior is tempered, that of the likelihood to
            the power of 1 / kl_weight. Of several the one is taken under which held-out rows have
            the highest mixture log likelihood.
        noise_factor: on the predicted sd of y given the weights; "validated" takes the one under
            which held-out rows have the highest mixture log likelihood.
        members: networks that are trained at once from starts of their own; predictions are those
            of their mixture, with equal weights.
        last_layer: "exact" replaces the last layer's posterior by the exact one of Bayesian linear
            regression on the features that the other layers compute at their means, with noise and
            prior scale of the highest evidence (Snoek et al. 2015).
        steps, batch_size, lr, warm_up, init_scale, local_reparam: as of `Recipe`.
        early_stopping: hold rows out and keep the parameters that predict them best.
        patience: looks at the held-out rows, of which there are 40 in a whole fit, without a better
            one that end it.
        validation_fraction: of the rows, held out to choose by. Without early stopping the network
            is trained on all rows after the choice.
        num_draws: networks that predictions are averaged over.
        progress: a progress bar, as of `pvi.fit`.
        random_state: an int makes everything repeatable.

    Attributes:
        fit_: the `pvi.Fit` of the weights.
        kl_weight_, noise_factor_: that were taken.
        validation_scores_: mean log likelihood of the held-out rows for each KL weight, nats; empty
            where nothing was chosen.
        tempered_: whether this is the posterior of a tempered likelihood.
        notes_: what was chosen on which rows, and what the predictions are if not the model's.

    >>> import numpy as np
    >>> x = np.linspace(-1, 1, 60)[:, None]
    >>> model = BNNRegressor(steps=300, random_state=0).fit(x, 3 * x[:, 0])
    >>> mean, sd = model.predict([[0.5]], return_std=True)
    >>> bool(abs(mean[0] - 1.5) < 0.5)
    True
    """

    def __init__(
        self,
        hidden: Sequence[int] = (50,),
        *,
        activation: str = "relu",
        network: nn.Module | None = None,
        prior: Any = None,
        likelihood: str | Likelihood = "gaussian",
        kl_weight: float | Sequence[float] = 1.0,
        noise_factor: float | str = 1.0,
        members: int = 1,
        last_layer: str | None = None,
        steps: int = 2000,
        batch_size: int = 128,
        lr: float = 0.01,
        warm_up: float = 0.2,
        init_scale: float = 0.01,
        local_reparam: str | None = "local",
        early_stopping: bool = False,
        patience: int = 8,
        validation_fraction: float = 0.2,
        num_draws: int = 100,
        progress: bool | None = None,
        random_state: Any = None,
    ):
        self.hidden, self.activation, self.network, self.prior = hidden, activation, network, prior
        self.likelihood, self.kl_weight, self.noise_factor = likelihood, kl_weight, noise_factor
        self.members, self.last_layer, self.steps = members, last_layer, steps
        self.batch_size, self.lr, self.warm_up = batch_size, lr, warm_up
        self.init_scale, self.local_reparam = init_scale, local_reparam
        self.early_stopping, self.patience = early_stopping, patience
        self.validation_fraction, self.num_draws = validation_fraction, num_draws
        self.progress, self.random_state = progress, random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Train the network.

        Args:
            X: `(N, d)`.
            y: `(N,)`.

        Raises:
            DataError: y has no density under the likelihood.
        """
        X, y = validate_data(self, X, y, y_numeric=True, dtype=np.float64)
        self._check_options()
        return self._fit(X, y)

    @available_if(_learns_on)
    def partial_fit(self, X: Any, y: Any) -> Self:
        """Learn from further rows: the posterior so far is the prior (Nguyen et al. 2018).

        The first rows settle the units of inputs and targets. Nothing is chosen on held-out rows.

        Args:
            X, y: as of `fit`.
        """
        first = not hasattr(self, "fit_")
        X, y = validate_data(self, X, y, y_numeric=True, dtype=np.float64, reset=first)
        self._check_options()
        return self._go_on(X, y)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Means of y, `(N,)`.

        Args:
            X: `(N, d)`.
            return_std: also the sds of y, of noise and weights together.
        """
        mean, variance = self._moments(self._read(X))
        center = self._fitted.units
        means = as_numpy(mean.mean(0)) * center.y_sd + center.y_mean
        if not return_std:
            return means
        return means, as_numpy(variance_uncertainty(mean, variance).total.sqrt()) * center.y_sd

    def sample_predict(self, X: Any, num_draws: int = 100, seed: int | None = None) -> np.ndarray:
        """Draws of y from the posterior predictive, `(num_draws, N)`.

        Args:
            X: `(N, d)`.
            num_draws: how many.
            seed: makes it repeatable.
        """
        draws = self._draws(self._read(X), num_draws, seed)
        return draws * self._fitted.units.y_sd + self._fitted.units.y_mean

    def log_likelihood(self, X: Any, y: Any) -> np.ndarray:
        """Log density of each row under the mixture of networks, in original units, `(N,)` nats.

        Args:
            X, y: as of `fit`.
        """
        check_is_fitted(self)
        X, y = validate_data(self, X, y, y_numeric=True, dtype=np.float64, reset=False)
        return as_numpy(self._log_likelihood(self._fitted, X, y))

    def uncertainty(self, X: Any) -> Uncertainty:
        """Variances of y, split into that of the noise and that of the weights' posterior.

        Args:
            X: `(N, d)`.
        """
        found = variance_uncertainty(*self._moments(self._read(X)))
        square = self._fitted.units.y_sd**2
        return Uncertainty(found.total * square, found.aleatoric * square, found.epistemic * square)

    # What differs from the classifier.

    def _check_options(self) -> None:
        if isinstance(self.likelihood, str) and self.likelihood not in HEADS:
            raise FitError(
                f"likelihood must be one of {sorted(HEADS)} or a likelihood of pvi.models.bnn, got "
                f"{self.likelihood!r}"
            )
        if self.last_layer not in (None, "exact"):
            raise FitError(f"last_layer must be None or 'exact', got {self.last_layer!r}")
        if self.last_layer and (self.members > 1 or self.likelihood != "gaussian"):
            raise FitError(
                "last_layer='exact' needs likelihood='gaussian' and members=1: its closed form is "
                "that of one network and one noise"
            )
        if not (self.noise_factor == "validated" or _is_positive(self.noise_factor)):
            raise FitError(f"noise_factor must be > 0 or 'validated', got {self.noise_factor!r}")
        if self.noise_factor != 1.0 and not self._has_scale():
            raise FitError("noise_factor is for 'gaussian' and 'heteroscedastic' likelihoods")

    def _has_scale(self) -> bool:
        return isinstance(self.likelihood, str) or type(self.likelihood) is Gaussian

    def _calibrates(self) -> bool:
        return self.noise_factor == "validated"

    def _start_factor(self) -> float:
        return 1.0 if self._calibrates() else float(self.noise_factor)

    def _likelihood(self, noise: Any = None) -> Likelihood:
        if isinstance(self.likelihood, Likelihood):
            return self.likelihood if noise is None else with_prior(self.likelihood, noise)
        scale = HEADS[self.likelihood]
        return Gaussian(scale, prior=noise if scale is None else None)

    def _units(self, x: np.ndarray, y: np.ndarray) -> Units:
        return Units.of(x, y if isinstance(self._likelihood(), Gaussian) else None)

    def _targets(self, units: Units, y: np.ndarray) -> Tensor:
        return units.targets(y)

    def _finished(self, fitted: Fitted, x: np.ndarray, y: np.ndarray) -> Fitted:
        if self.last_layer:
            head = best_linear_posterior(fitted.features(x), fitted.units.targets(y))
            fitted.head = head
        return fitted

    def _moments(self, x: np.ndarray) -> tuple[Tensor, Tensor]:
        """Means and variances of standardised y given each network, `(S, N)`."""
        fitted, seed = self._fitted, self.seed_
        if fitted.head is not None:
            mean, variance = fitted.head.predict(fitted.features(x))
            noise = variance.new_tensor((fitted.head.noise * fitted.factor) ** 2)
            sd = variance.sqrt()  # two points with the variance of the function
            return torch.stack([mean - sd, mean + sd]), noise.expand(2, len(mean))
        mean, variance = fitted.stacked(
            x, self.num_draws, seed, lambda fn: fn.mean, lambda fn: fn.variance
        )
        return mean, variance * fitted.factor**2

    def _log_likelihood(self, fitted: Fitted, x: np.ndarray, y: np.ndarray) -> Tensor:
        targets, units = fitted.units.targets(y), fitted.units
        if fitted.head is not None:
            mean, variance = fitted.head.predict(fitted.features(x))
            sd = (variance + (fitted.head.noise * fitted.factor) ** 2).sqrt()
            return dist.Normal(mean, sd).log_prob(targets.double()) - np.log(units.y_sd)

        def density(fn: Any) -> Tensor:
            if fitted.factor != 1.0:
                fn = dist.Normal(fn.mean, fn.stddev * fitted.factor)
            return fn.log_prob(for_members(targets, fn))

        (log_lik,) = fitted.stacked(x, self.num_draws, self.seed_, density)
        return mixture_log_likelihood(log_lik, units.y_sd)

    def _draws(self, x: np.ndarray, num_draws: int, seed: int | None) -> np.ndarray:
        head = self._fitted.head
        if head is None:
            return super()._draws(x, num_draws, seed)
        rng = np.random.default_rng(seed)
        function = head.draws(self._fitted.features(x), num_draws, rng)
        noise = head.noise * self._fitted.factor
        return function + noise * rng.standard_normal(function.shape)

    def _drawn(self, fn: Any) -> Tensor:
        if self._fitted.factor != 1.0:
            fn = dist.Normal(fn.mean, fn.stddev * self._fitted.factor)
        return fn.sample()


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
