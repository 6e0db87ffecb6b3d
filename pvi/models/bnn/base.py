"""What the estimators of numbers and of classes share."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor, nn

from pvi.engine.traces import preserved_rng
from pvi.errors import CheckpointError, FitError
from pvi.fit.storage import read, write
from pvi.models.bnn.bayesian import BayesianModule, bayesianize
from pvi.models.bnn.continual import posterior_as_prior
from pvi.models.bnn.fitted import Fitted, Units
from pvi.models.bnn.likelihoods import Likelihood
from pvi.models.bnn.noise import noise_prior
from pvi.models.bnn.stored import from_plain, plain, restore, state_of
from pvi.models.bnn.training import Recipe, Stopping
from pvi.nn import MLP
from pvi.nn.component import describe, make

FACTORS = (0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0)  # on predicted sds, to choose from
LOOKS = 40  # of early stopping in a whole fit
FEWEST = 5  # rows that can be divided


class BNN(BaseEstimator):
    """A network with a posterior over its weights: see `BNNRegressor` and `BNNClassifier`."""

    _fitted: Fitted

    def __init__(
        self,
        hidden: Sequence[int] = (50,),
        *,
        activation: str = "relu",
        network: nn.Module | None = None,
        prior: Any = None,
        kl_weight: float | Sequence[float] = 1.0,
        members: int = 1,
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
        self.kl_weight, self.members, self.steps = kl_weight, members, steps
        self.batch_size, self.lr, self.warm_up = batch_size, lr, warm_up
        self.init_scale, self.local_reparam = init_scale, local_reparam
        self.early_stopping, self.patience = early_stopping, patience
        self.validation_fraction, self.num_draws = validation_fraction, num_draws
        self.progress, self.random_state = progress, random_state

    # What the two differ in.

    @abstractmethod
    def _likelihood(self, noise: Any = None) -> Likelihood:
        """Of standardised targets; `noise` is a prior for one that has a latent noise."""

    @abstractmethod
    def _units(self, x: np.ndarray, y: np.ndarray) -> Units: ...

    @abstractmethod
    def _targets(self, units: Units, y: np.ndarray) -> Tensor: ...

    @abstractmethod
    def _log_likelihood(self, fitted: Fitted, x: np.ndarray, y: np.ndarray) -> Tensor:
        """Log density of each row under the mixture, in original units, `(N,)`."""

    @abstractmethod
    def _drawn(self, fn: Any) -> Tensor:
        """A draw of standardised targets from a distribution of them."""

    def _finished(self, fitted: Fitted, x: np.ndarray, y: np.ndarray) -> Fitted:
        return fitted

    def _calibrates(self) -> bool:
        return False

    def _start_factor(self) -> float:
        return 1.0

    # Training.

    def _fit(self, x: np.ndarray, y: np.ndarray) -> Self:
        """Choose what has several values on held-out rows, then train on all rows."""
        self._memory, self.notes_ = None, ()
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        weights = _weights(self.kl_weight)
        self.kl_weight_, self.noise_factor_ = weights[0], self._start_factor()
        self.validation_scores_: dict[float, float] = {}
        kept = None
        if len(weights) > 1 or self.early_stopping or self._calibrates():
            kept = self._choose(x, y, weights)
        fitted = kept or self._train(x, y, self.kl_weight_)
        return self._keep(replace(fitted, factor=self.noise_factor_))

    def _choose(self, x: np.ndarray, y: np.ndarray, weights: Sequence[float]) -> Fitted | None:
        """Take the weight and factor that suit held-out rows; the fit, if it is to be kept."""
        if len(x) < FEWEST:
            raise FitError(
                f"{len(x)} rows are too few to hold some out: give one kl_weight, and neither "
                "early_stopping nor noise_factor='validated'"
            )
        options = {"test_size": self.validation_fraction, "random_state": self.seed_}
        parts: Any = train_test_split(x, y, **options)
        first, held, y_first, y_held = parts
        found, scores = {}, {}
        for weight in weights:
            found[weight] = self._train(first, y_first, weight, held, y_held)
            scores[weight] = self._validated(found[weight], held, y_held)
        self.validation_scores_ = {weight: score for weight, (score, _) in scores.items()}
        self.kl_weight_ = max(weights, key=lambda weight: scores[weight][0])
        self.noise_factor_ = scores[self.kl_weight_][1]
        text = f"kl_weight {self.kl_weight_:g}"
        text += f" and noise_factor {self.noise_factor_:g}" if self._calibrates() else ""
        text += " and the number of steps" if self.early_stopping else ""
        self.notes_ = (f"{text}: chosen on {len(held)} held-out rows of {len(x)}",)
        return found[self.kl_weight_] if self.early_stopping else None

    def _validated(self, fitted: Fitted, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        """Mean log density of held-out rows, and the noise factor at which it is highest."""
        factors = FACTORS if self._calibrates() else (self._start_factor(),)
        scores = {
            f: float(self._log_likelihood(replace(fitted, factor=f), x, y).mean()) for f in factors
        }
        best = max(scores, key=lambda f: scores[f])
        return scores[best], best

    def _train(
        self, x: np.ndarray, y: np.ndarray, weight: float, held: Any = None, y_held: Any = None
    ) -> Fitted:
        """One fit; with early stopping until held-out rows are predicted best."""
        units = self._units(x, y)
        model = self._model(x.shape[1])
        rows, targets = self._rows(units, x, y)
        model.likelihood.check(targets)
        stopping = None
        if self.early_stopping and held is not None:
            every = max(1, self.steps // LOOKS)
            stopping = Stopping(*self._rows(units, held, y_held), every, self.patience)
        options = {"seed": self.seed_, "progress": self.progress, "stopping": stopping}
        fit = self._recipe(weight).fit(model, rows, targets, **options)
        return self._finished(Fitted(fit, units), x, y)

    def _go_on(self, x: np.ndarray, y: np.ndarray) -> Self:
        """Variational continual learning: one more set of rows."""
        weights = _weights(self.kl_weight)
        if len(weights) > 1 or self.early_stopping or self._calibrates():
            raise FitError(
                "partial_fit chooses nothing on held-out rows: give one kl_weight, and neither "
                "early_stopping nor noise_factor='validated'"
            )
        if not hasattr(self, "fit_"):
            return self._fit(x, y)
        before, units = self._fitted.fit, self._fitted.units
        self._memory = posterior_as_prior(before), noise_prior(before)
        with before.posterior.drawing(None):
            start = before.guide.mean()  # type: ignore[union-attr]
        model = self._model(x.shape[1])
        rows, targets = self._rows(units, x, y)
        model.likelihood.check(targets)
        recipe = replace(self._recipe(weights[0]), warm_up=0.0)  # else it forgets meanwhile
        options = {"seed": self.seed_, "progress": self.progress, "start": start}
        fit = recipe.fit(model, rows, targets, **options)
        kept = self._finished(Fitted(fit, units, factor=self._fitted.factor), x, y)
        self.notes_ = ("the prior is the posterior given earlier rows",)
        return self._keep(kept)

    def _keep(self, fitted: Fitted) -> Self:
        self._fitted, self.fit_ = fitted, fitted.fit
        self.tempered_ = self.kl_weight_ != 1.0
        if self.tempered_:
            text = f"tempered: the KL counts {self.kl_weight_:g} times, so this is no posterior of "
            self.notes_ += (text + "the model and its bound none on the evidence",)
        if self.noise_factor_ != 1.0:
            text = f"predicted sds are {self.noise_factor_:g} times those of the model"
            self.notes_ += (text,)
        return self

    def _recipe(self, weight: float) -> Recipe:
        return Recipe(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            kl_weight=weight,
            warm_up=self.warm_up,
            init_scale=self.init_scale,
            local_reparam=self.local_reparam,
        )

    def _model(self, inputs: int) -> BayesianModule:
        memory, noise = self._memory or (None, None)
        likelihood = self._likelihood(noise)
        module = self.network
        if module is None:
            with preserved_rng():
                torch.manual_seed(self.seed_)
                module = MLP(inputs, likelihood.width, tuple(self.hidden), self.activation)
        prior = memory or self.prior
        return bayesianize(module, prior=prior, likelihood=likelihood, copies=int(self.members))

    def _rows(self, units: Units, x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
        """The model's arguments; with several members each has the same rows."""
        rows, targets = units.inputs(x), self._targets(units, y)
        if self.members > 1:
            rows = rows.unsqueeze(1).expand(-1, self.members, *rows.shape[1:])
            targets = targets.unsqueeze(1).expand(-1, self.members)
        return rows, targets

    # Prediction.

    def _read(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        found: Any = validate_data(self, X, dtype=np.float64, reset=False)
        return found

    def _draws(self, x: np.ndarray, num_draws: int, seed: int | None) -> np.ndarray:
        """Standardised targets from the posterior predictive, `(num_draws, N)`."""
        if num_draws < 1:
            raise FitError(f"num_draws: expected at least 1, got {num_draws}")
        with preserved_rng():
            seed = int(np.random.default_rng(seed).integers(2**31))
            torch.manual_seed(seed)
            (found,) = self._fitted.stacked(x, num_draws, seed, self._drawn)
        return found[:num_draws].double().numpy()

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        text = super().__repr__(N_CHAR_MAX)
        if getattr(self, "tempered_", False):
            text += f"  # tempered posterior: KL weight {self.kl_weight_:g}"
        return text

    # Files.

    def save(self, folder: Any) -> None:
        """Write the fitted estimator to a folder: safetensors and JSON, no code.

        Args:
            folder: its name.

        Raises:
            CheckpointError: an argument is no plain data.
        """
        check_is_fitted(self)
        arguments = {name: describe(value) for name, value in self.get_params(False).items()}
        tree = {"estimator": type(self).__name__, "arguments": arguments}
        write(Path(folder), tree | {"state": plain(state_of(self))})

    @classmethod
    def load(cls, folder: Any, **modules: nn.Module) -> Self:
        """The estimator that `save` wrote; its predictions are the same.

        Args:
            folder: its name.
            modules: `network=`, where it was a module of one's own: another of the same shapes.

        Raises:
            CheckpointError: it is the folder of something else, or a module is missing.
        """
        tree = read(Path(folder))
        if tree.get("estimator") != cls.__name__:
            kind = tree.get("estimator", "something else")
            raise CheckpointError(f"{folder} holds {kind}, no {cls.__name__}")
        arguments: dict[str, Any] = {
            name: modules[name] if name in modules else make(x, modules, name)
            for name, x in tree["arguments"].items()
        }
        for name, value in arguments.items():  # of JSON
            arguments[name] = tuple(value) if isinstance(value, list) else value
        found = cls(**arguments)
        restore(found, from_plain(tree["state"]))
        return found

    def __getstate__(self) -> dict[str, Any]:
        given: Any = super().__getstate__()
        state: dict[str, Any] = dict(given)
        if "_fitted" in state:
            names = [name for name in state if name.endswith("_") or name.startswith("_fitted")]
            state = {name: x for name, x in state.items() if name not in [*names, "_memory"]}
            state["stored"] = state_of(self)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state.pop("stored", None)
        super().__setstate__(state)
        if stored is not None:
            restore(self, stored)


def _weights(given: float | Sequence[float]) -> list[float]:
    """The KL weights to choose from."""
    single = isinstance(given, int | float)
    weights = [float(given)] if single else [float(w) for w in given]  # type: ignore[union-attr]
    if not weights or not all(w > 0 for w in weights):
        raise FitError(f"kl_weight must be a number > 0 or several of them, got {given!r}")
    return weights
