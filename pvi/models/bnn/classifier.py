"""Bayesian neural networks of classes as scikit-learn's estimators."""

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pvi.models.bnn.base import BNN
from pvi.models.bnn.fitted import Fitted, Units
from pvi.models.bnn.likelihoods import Categorical, Likelihood
from pvi.models.bnn.metrics import Uncertainty, class_uncertainty, mixture_log_likelihood
from pvi.models.bnn.predictive import as_numpy, for_members


class BNNClassifier(ClassifierMixin, BNN):
    """A Bayesian neural network of classes, as a scikit-learn estimator.

    Inputs are standardised by the means and sds of the training rows. Probabilities are those of
    the mixture of `num_draws` networks drawn from a mean-field posterior.

    Args:
        network: a module of one's own, from `(N, d)` to logits `(N, classes)`.
        others: as of `BNNRegressor`, with its attributes.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train the network.

        Args:
            X: `(N, d)`.
            y: `(N,)` classes of any kind.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_ = unique_labels(y)
        return self._fit(X, self._numbers(y))

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Learn from further rows: the posterior so far is the prior (Nguyen et al. 2018).

        The first rows settle the units of the inputs. Nothing is chosen on held-out rows.

        Args:
            X, y: as of `fit`.
            classes: all that there will be, at the first call; by default those of its y.
        """
        first = not hasattr(self, "fit_")
        X, y = validate_data(self, X, y, dtype=np.float64, reset=first)
        check_classification_targets(y)
        if first:
            self.classes_ = np.unique(y if classes is None else classes)
        return self._go_on(X, self._numbers(y))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes in the order of `classes_`, `(N, classes)`.

        Args:
            X: `(N, d)`.
        """
        mean = self._probabilities(self._read(X)).double().mean(0)
        return as_numpy(mean / mean.sum(-1, keepdim=True))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row, `(N,)`.

        Args:
            X: `(N, d)`.
        """
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def sample_predict(self, X: Any, num_draws: int = 100, seed: int | None = None) -> np.ndarray:
        """Draws of y from the posterior predictive, `(num_draws, N)` classes.

        Args:
            X: `(N, d)`.
            num_draws: how many.
            seed: makes it repeatable.
        """
        draws = self._draws(self._read(X), num_draws, seed).astype(int)
        return self.classes_[draws]

    def log_likelihood(self, X: Any, y: Any) -> np.ndarray:
        """Log probability of each row's class under the mixture of networks, `(N,)` nats.

        Args:
            X, y: as of `fit`.
        """
        check_is_fitted(self)
        X, y = validate_data(self, X, y, dtype=np.float64, reset=False)
        return as_numpy(self._log_likelihood(self._fitted, X, self._numbers(y)))

    def uncertainty(self, X: Any) -> Uncertainty:
        """Entropies of the predictions, nats, and their split: epistemic is the information that
        the class would give about the weights.

        Args:
            X: `(N, d)`.
        """
        return class_uncertainty(self._probabilities(self._read(X)))

    # What differs from the regressor.

    def _numbers(self, y: np.ndarray) -> np.ndarray:
        """The place of each class in `classes_`."""
        if unknown := sorted(set(np.unique(y)) - set(self.classes_)):
            raise ValueError(f"y: classes {unknown} are not among {list(self.classes_)}")
        return np.searchsorted(self.classes_, y)

    def _likelihood(self, noise: Any = None) -> Likelihood:
        return Categorical(max(len(self.classes_), 2))  # one class alone has a logit for another

    def _units(self, x: np.ndarray, y: np.ndarray) -> Units:
        return Units.of(x)

    def _targets(self, units: Units, y: np.ndarray) -> Tensor:
        return torch.as_tensor(y, dtype=torch.long)

    def _probabilities(self, x: np.ndarray) -> Tensor:
        """Of the classes given each network, `(S, N, classes)`."""
        (found,) = self._fitted.stacked(x, self.num_draws, self.seed_, lambda fn: fn.probs)
        return (
            found[..., : len(self.classes_)] if len(self.classes_) > 1 else found[..., :1] * 0 + 1
        )

    def _log_likelihood(self, fitted: Fitted, x: np.ndarray, y: np.ndarray) -> Tensor:
        targets = torch.as_tensor(y)

        def density(fn: Any) -> Tensor:
            return fn.log_prob(for_members(targets, fn))

        (log_lik,) = fitted.stacked(x, self.num_draws, self.seed_, density)
        return mixture_log_likelihood(log_lik)

    def _drawn(self, fn: Any) -> Tensor:
        return fn.sample()
