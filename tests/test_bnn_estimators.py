"""The estimators: scikit-learn's own checks, what is chosen on which rows, files, repeatability."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import check_estimator

import pvi
from pvi.errors import CheckpointError, DataError, FitError
from pvi.models import bnn
from pvi.models.bnn import base
from pvi.models.bnn.linear import best_linear_posterior
from pvi.models.bnn.metrics import mixture_log_likelihood
from pvi.models.bnn.predictive import draw_networks, predicted
from pvi.models.bnn.stopping import EarlyStopping

QUICK = {"hidden": (8,), "steps": 40, "lr": 0.05, "num_draws": 20, "progress": False}
N = 60


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A curve in units that are not standard."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, 2)) * [1.0, 30.0] + [0.0, 100.0]
    return x, 1000.0 + 50.0 * np.tanh(2 * x[:, 0]) + 5.0 * rng.normal(size=N)


def regressor(**options) -> bnn.BNNRegressor:
    return bnn.BNNRegressor(**(QUICK | {"random_state": 0} | options))


def classifier(**options) -> bnn.BNNClassifier:
    return bnn.BNNClassifier(**(QUICK | {"random_state": 0} | options))


@pytest.fixture(scope="module")
def fitted() -> bnn.BNNRegressor:
    return regressor(steps=200).fit(*data())


@pytest.fixture(scope="module")
def classes() -> tuple[bnn.BNNClassifier, np.ndarray, np.ndarray]:
    x, y = data()
    names = np.array(["low", "middle", "high"])[np.digitize(y, [975.0, 1025.0])]
    return classifier(steps=150, members=2).fit(x, names), x, names


CHECKED = {"steps": 20, "lr": 0.1}


@pytest.mark.parametrize(
    "estimator",
    [
        regressor(),
        classifier(**CHECKED),
        pytest.param(regressor(last_layer="exact", **CHECKED), marks=pytest.mark.slow),
    ],
)
def test_scikit_learns_checks(estimator) -> None:
    check_estimator(estimator, on_skip=None)


def test_regression(fitted: bnn.BNNRegressor) -> None:
    x, y = data(1)
    mean, sd = fitted.predict(x, return_std=True)
    assert fitted.score(x, y) > 0.9
    assert np.array_equal(mean, fitted.predict(x))
    assert 3.0 < np.sqrt(np.mean((mean - y) ** 2)) < 12.0  # the noise is 5
    assert np.all(sd > 3.0) and np.all(sd < 40.0)
    split = fitted.uncertainty(x)
    np.testing.assert_allclose(split.total.sqrt().numpy(), sd, rtol=1e-5)
    np.testing.assert_allclose(split.aleatoric + split.epistemic, split.total, rtol=1e-5)


def test_log_likelihood_is_that_of_the_mixture_in_original_units(fitted) -> None:
    """Against the networks' normals, put together by hand."""
    x, y = data(1)
    inner = fitted._fitted
    (mean, sd) = inner.stacked(
        x, fitted.num_draws, fitted.seed_, lambda f: f.mean, lambda f: f.stddev
    )
    c, center = inner.units.y_sd, inner.units.y_mean
    parts = torch.distributions.Normal(mean * c + center, sd * c).log_prob(torch.as_tensor(y))
    expected = logsumexp(parts.numpy(), axis=0) - np.log(len(parts))
    np.testing.assert_allclose(fitted.log_likelihood(x, y), expected, rtol=1e-4, atol=1e-4)


def test_draws_have_the_moments_that_are_predicted(fitted: bnn.BNNRegressor) -> None:
    x, _ = data(1)
    draws = fitted.sample_predict(x, 2000, seed=1)
    mean, sd = fitted.predict(x, return_std=True)
    assert draws.shape == (2000, N)
    # both are of finite numbers of networks: 20 for the moments
    error = np.abs(draws.mean(0) - mean) / (sd * (1 / 2000 + 1 / 20) ** 0.5)
    assert error.max() < 4.5
    assert np.array_equal(draws, fitted.sample_predict(x, 2000, seed=1))
    assert not np.array_equal(draws, fitted.sample_predict(x, 2000, seed=2))


def test_one_seed_gives_the_same_predictions_and_leaves_random_numbers_alone() -> None:
    x, y = data()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = regressor().fit(x, y).predict(x)
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(first, regressor().fit(x, y).predict(x))
    assert not np.array_equal(first, regressor(random_state=1).fit(x, y).predict(x))


def test_predictions_change_nothing(fitted: bnn.BNNRegressor) -> None:
    x, _ = data()
    before = {k: v.clone() for k, v in fitted.fit_.posterior.params.tensors().items()}
    assert np.array_equal(fitted.predict(x), fitted.predict(x))
    after = fitted.fit_.posterior.params.tensors()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_choices_see_the_held_out_rows_of_the_training_data_alone(monkeypatch) -> None:
    """No fit of the choice sees a held-out row, no score another; the last fit sees all rows."""
    x, y = data()
    seen: list[tuple[str, set]] = []
    train, validate = base.BNN._train, base.BNN._validated

    def noted_train(self, x, y, *rest):
        seen.append(("train", set(y)))
        return train(self, x, y, *rest)

    def noted_score(self, fitted, x, y):
        seen.append(("score", set(y)))
        return validate(self, fitted, x, y)

    monkeypatch.setattr(base.BNN, "_train", noted_train)
    monkeypatch.setattr(base.BNN, "_validated", noted_score)
    model = regressor(kl_weight=(1.0, 0.1), noise_factor="validated").fit(x, y)
    _, held = train_test_split(y, test_size=0.2, random_state=model.seed_)
    trains = [rows for kind, rows in seen if kind == "train"]
    assert [kind for kind, _ in seen] == ["train", "score", "train", "score", "train"]
    assert all(rows == set(held) for kind, rows in seen if kind == "score")
    assert trains[0] == trains[1] == set(y) - set(held)
    assert trains[2] == set(y)
    assert set(model.validation_scores_) == {1.0, 0.1}
    assert model.kl_weight_ == max(model.validation_scores_, key=model.validation_scores_.get)


def test_tempered_posteriors_say_so() -> None:
    x, y = data()
    model = regressor(kl_weight=0.3, steps=5).fit(x, y)
    assert model.tempered_ and "tempered" in repr(model)
    assert any("no posterior of the model" in note for note in model.notes_)
    assert "tempered" in str(model.fit_.posterior.reservations)
    plain = regressor(steps=5).fit(x, y)
    assert not plain.tempered_ and plain.notes_ == () and "tempered" not in repr(plain)


def test_early_stopping_keeps_the_best_look() -> None:
    """A network that overfits is stopped, with the parameters of its best look, not of its last."""
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    y = torch.sin(2 * x[:, 0]) + 0.3 * torch.randn(60)
    module = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.ReLU(), torch.nn.Linear(50, 1))
    model = pvi.local_reparam(bnn.bayesianize(module))
    guide = pvi.guides.MeanField(init_loc_fn=bnn.he(model), init_scale=0.01)
    look = EarlyStopping(model, guide, x[40:], y[40:], every=20, patience=3)
    options = {"steps": 1000, "lr": 0.02, "seed": 0, "progress": False, "callbacks": [look]}
    objective = pvi.BetaELBO(0.01, kl="exact")
    fit = pvi.fit(model, guide, (x[:40], y[:40]), objective=objective, **options)
    assert len(fit.history) == look.step + 60 < 1000
    assert f"best after {look.step} steps" in fit.reason
    assert look._score(fit.posterior.params) == pytest.approx(look.best, rel=1e-5)
    networks = draw_networks(fit.posterior, 500, seed=1)
    log_lik = predicted(fit.posterior, networks, x[40:]).log_prob(y[40:])
    score = float(mixture_log_likelihood(log_lik).mean())
    assert score == pytest.approx(look.best, abs=0.15)  # 16 networks against 500


def test_estimators_stop_early() -> None:
    x, y = data()
    model = regressor(early_stopping=True, patience=1, steps=200, kl_weight=0.01).fit(x, y)
    assert len(model.fit_.history) < 200
    assert "held-out rows were predicted best" in model.fit_.reason
    assert "number of steps" in model.notes_[0]


def test_exact_last_layer_is_linear_regression_on_the_features() -> None:
    x, y = data()
    model = regressor(last_layer="exact").fit(x, y)
    inner = model._fitted
    truth = best_linear_posterior(inner.features(x), inner.units.targets(y))
    mean, variance = truth.predict(inner.features(x))
    own, sd = model.predict(x, return_std=True)
    np.testing.assert_allclose(own, mean * inner.units.y_sd + inner.units.y_mean, rtol=1e-6)
    total = (variance + truth.noise**2).sqrt() * inner.units.y_sd
    np.testing.assert_allclose(sd, total, rtol=1e-6)
    density = torch.distributions.Normal(torch.tensor(own), torch.tensor(sd))
    expected = density.log_prob(torch.tensor(y))
    np.testing.assert_allclose(model.log_likelihood(x, y), expected, rtol=1e-6)
    draws = model.sample_predict(x, 4000, seed=0)
    np.testing.assert_allclose(draws.std(0), sd, rtol=5 / 8000**0.5)


def test_members_differ_and_are_mixed() -> None:
    x, y = data()
    model = regressor(members=3).fit(x, y)
    networks = model._fitted.networks(20, 0)
    first = next(iter(networks.values()))
    assert first.shape[:2] == (7, 3)  # 20 networks of 3 members
    assert not torch.allclose(first[:, 0].mean(0), first[:, 1].mean(0), atol=0.1)
    assert model.predict(x).shape == (N,)


def test_the_next_rows_start_from_the_posterior() -> None:
    """The prior of the second fit is the posterior of the first, noise included."""
    x, y = data()
    model = regressor(steps=100).partial_fit(x[:30], y[:30])
    before, units = model.fit_, model._fitted.units
    model.partial_fit(x[30:], y[30:])
    assert model._fitted.units is units
    with before.posterior.drawing(None):
        mean = before.guide.mean()
    prior = model._fitted.model.prior
    for name, (loc, scale) in prior.values.items():
        assert torch.equal(loc, mean[name]) and bool((scale > 0).all())
    spread = before.posterior.sample(4000, seed=0)
    for name, (_, scale) in prior.values.items():
        ratio = spread[name].std(0) / scale
        assert float((ratio - 1).abs().max()) < 5 / 8000**0.5
    logs = spread["noise"].log()
    noise = model._fitted.model.likelihood.prior
    assert float(noise.scale) == pytest.approx(float(logs.std()), rel=5 / 8000**0.5)


def test_continual_learning_remembers() -> None:
    """After rows of the right half, the left half is still known; fitted anew, it is forgotten."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, size=(160, 1))
    y = np.sin(2 * x[:, 0]) + 0.1 * rng.normal(size=160)
    left = x[:, 0] < 0
    options = {"hidden": (20,), "steps": 200, "lr": 0.03}
    both = regressor(**options).partial_fit(x[left], y[left])
    both.partial_fit(x[~left], y[~left])
    last = regressor(**options).fit(x[~left], y[~left])
    error = np.sqrt(np.mean((both.predict(x[left]) - y[left]) ** 2))
    forgotten = np.sqrt(np.mean((last.predict(x[left]) - y[left]) ** 2))
    assert error < 0.5 * forgotten


def test_classes(classes) -> None:
    model, x, names = classes
    p = model.predict_proba(x)
    assert p.shape == (N, 3)
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-9)
    assert model.score(x, names) > 0.7  # the largest class has less than half of the rows
    assert np.array_equal(model.predict(x), model.classes_[p.argmax(1)])
    log_p = np.log(p[np.arange(N), np.searchsorted(model.classes_, names)])
    np.testing.assert_allclose(model.log_likelihood(x, names), log_p, rtol=1e-4, atol=1e-5)
    draws = model.sample_predict(x, 500, seed=0)
    frequency = (draws == model.classes_[0]).mean(0)
    assert np.abs(frequency - p[:, 0]).max() < 5 * (0.25 / 500 + 0.25 / 20) ** 0.5
    split = model.uncertainty(x)
    entropy = -np.sum(p * np.log(np.clip(p, 1e-30, 1)), 1)
    np.testing.assert_allclose(split.total.numpy(), entropy, rtol=1e-3, atol=1e-4)


def test_classes_of_later_rows() -> None:
    x, y = data()
    labels = (y > 1000.0).astype(int)
    model = classifier().partial_fit(x[:30], labels[:30], classes=[0, 1, 2])
    model.partial_fit(x[30:], labels[30:])
    assert model.predict_proba(x).shape == (N, 3)
    with pytest.raises(ValueError, match="not among"):
        model.partial_fit(x[:2], [0, 7])


def test_counts_have_no_units() -> None:
    x, _ = data()
    y = np.random.default_rng(0).poisson(np.exp(1 + 0.5 * np.tanh(x[:, 0])))
    model = regressor(likelihood=bnn.Poisson(), steps=150).fit(x, y)
    assert model._fitted.units.y_sd == 1.0
    assert np.all(model.predict(x) > 0)
    assert np.all(model.sample_predict(x, 5, seed=0) >= 0)
    with pytest.raises(DataError, match="whole numbers"):
        regressor(likelihood=bnn.Poisson()).fit(x, y - 0.5)


def test_files_and_pickles_predict_the_same(fitted, classes, tmp_path: Path) -> None:
    x, _ = data(1)
    fitted.save(tmp_path / "r")
    again = bnn.BNNRegressor.load(tmp_path / "r")
    assert np.array_equal(again.predict(x), fitted.predict(x))
    assert again.get_params() == fitted.get_params()
    model = classes[0]
    model.save(tmp_path / "c")
    loaded = bnn.BNNClassifier.load(tmp_path / "c")
    assert np.array_equal(loaded.predict_proba(x), model.predict_proba(x))
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(x), model.predict(x))
    with pytest.raises(CheckpointError, match="no BNNRegressor"):
        bnn.BNNRegressor.load(tmp_path / "c")


def test_what_was_learned_goes_on_after_loading(tmp_path: Path) -> None:
    x, y = data()
    network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    model = regressor(network=network).partial_fit(x[:30], y[:30]).partial_fit(x[30:], y[30:])
    model.save(tmp_path / "r")
    with pytest.raises(CheckpointError, match="network="):
        bnn.BNNRegressor.load(tmp_path / "r")
    again = bnn.BNNRegressor.load(tmp_path / "r", network=network)
    assert np.array_equal(again.predict(x), model.predict(x))
    next_one, other = (m.partial_fit(x, y).predict(x) for m in (again, model))
    np.testing.assert_allclose(next_one, other, rtol=1e-6)


def test_a_fresh_process_predicts_the_same(fitted, tmp_path: Path) -> None:
    x, _ = data(1)
    fitted.save(tmp_path / "r")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np\n"
        "from pvi.models import bnn\n"
        "model = bnn.BNNRegressor.load(sys.argv[1] + '/r')\n"
        "np.save(sys.argv[1] + '/y.npy', model.predict(np.load(sys.argv[1] + '/x.npy')))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert np.array_equal(np.load(tmp_path / "y.npy"), fitted.predict(x))


def test_a_network_of_ones_own_stays_as_it_is() -> None:
    x, y = data()
    network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    regressor(network=network).fit(x, y)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"likelihood": "cauchy"}, "likelihood"),
        ({"last_layer": "laplace"}, "last_layer"),
        ({"last_layer": "exact", "members": 2}, "members=1"),
        ({"kl_weight": 0.0}, "kl_weight"),
        ({"kl_weight": ()}, "kl_weight"),
        ({"noise_factor": -1.0}, "noise_factor"),
        ({"noise_factor": 2.0, "likelihood": bnn.Poisson()}, "noise_factor"),
        ({"warm_up": 2.0}, "warm_up"),
    ],
)
def test_errors_name_the_argument(options: dict, words: str) -> None:
    x, y = data()
    with pytest.raises(FitError, match=words):
        regressor(**options).fit(x, y)


def test_too_few_rows_to_choose_on() -> None:
    with pytest.raises(FitError, match="too few"):
        regressor(early_stopping=True).fit(np.ones((3, 1)), np.arange(3.0))
    with pytest.raises(FitError, match="one kl_weight"):
        regressor(kl_weight=(1.0, 0.1)).partial_fit(*data())


def test_the_noise_is_carried_on_for_a_likelihood_of_ones_own() -> None:
    x, y = data()
    given = bnn.Gaussian()
    model = regressor(likelihood=given, steps=30).partial_fit(x, y).partial_fit(x, y)
    assert model._fitted.model.likelihood.prior is not None  # type: ignore[union-attr]
    assert given.prior is None and model.likelihood is given


def test_an_exact_layer_does_not_learn_in_turn() -> None:
    x, y = data()
    model = regressor(last_layer="exact")
    assert not hasattr(model, "partial_fit")
    with pytest.raises(AttributeError) as error:
        model.partial_fit(x, y)
    assert "forget" in str(error.value.__cause__)
