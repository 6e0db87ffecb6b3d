"""Simulation-based calibration: exact fits pass as often as they should, planted errors do not."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pvi
from pvi.diagnostics.uniformity import (
    asymmetry_pvalues,
    holm,
    uniformity_band,
    uniformity_pvalues,
)
from pvi.errors import CheckpointError, DataError, FitError, GuideError, ModelError, PviError
from pvi.figures import new_figure
from pvi.plots import plot_calibration
from pvi.posterior.arviz import load
from pvi.workflow.shapes import shape_of
from pvi.workflow.simulation import LOG_JOINT, summary
from tests.calibrated import (
    COV,
    Encoder,
    X,
    Y,
    coins,
    exact,
    factorised,
    halved,
    line,
    local,
    part,
    renamed,
    residual,
    series,
    shifted,
    wide_line,
    widened,
)

KS = 1.95  # sqrt(n) times the Kolmogorov-Smirnov distance is above with probability 0.001
QUICK: dict[str, Any] = {"num_draws": 99, "seed": 0, "progress": False}


def run(guide: Callable = exact, number: int = 60, **options: Any) -> pvi.SBC:
    """SBC of a closed-form guide."""
    posterior = pvi.Posterior(line, guide, (X, Y))
    return pvi.sbc(line, posterior, num_simulations=number, **QUICK | options)


@pytest.fixture(scope="module")
def calibrated() -> pvi.SBC:
    return run(number=240)


@pytest.fixture(scope="module")
def narrow() -> pvi.SBC:
    return run(factorised)


class TestUniformity:
    @pytest.mark.parametrize("test", [uniformity_pvalues, asymmetry_pvalues])
    @pytest.mark.parametrize("number", [7, 60, 150])
    def test_null(self, test: Callable, number: int) -> None:
        """At each value that it takes, an exact p-value is its own probability."""
        runs = 3000
        found = np.sort(test(np.random.default_rng(number).random((number, runs))))
        last = np.append(np.diff(found) > 1e-12, True)  # the end of each run of ties
        share = np.arange(1, runs + 1) / runs
        assert np.abs(share - found)[last].max() < KS / math.sqrt(runs)

    def test_band(self) -> None:
        points, low, high = uniformity_band(150, prob=0.9)
        values = np.random.default_rng(0).random((3000, 150))
        shares = (values[:, :, None] < points[1:-1]).mean(1)
        edge = 1e-9
        inside = ((shares >= low[1:-1] - edge) & (shares <= high[1:-1] + edge)).all(1)
        se = math.sqrt(0.9 * 0.1 / 3000)
        assert 0.9 - 3 * se < inside.mean() < 0.9 + 0.01 + 3 * se  # counts are whole

    def test_band_and_test_agree(self) -> None:
        values = np.random.default_rng(1).beta(0.8, 0.8, (150, 200))
        points, low, high = uniformity_band(150)
        shares = (values[..., None] < points).mean(0)
        shares[..., -1] = 1.0
        left = ((shares < low - 1e-9) | (shares > high + 1e-9)).any(-1)
        assert np.array_equal(left, uniformity_pvalues(values) <= 0.05)
        assert 0.1 < left.mean() < 0.9

    def test_walk_by_hand(self) -> None:
        # three signs alike: 2 of 8 walks; two of three steps out: all that start alike, 4 of 8
        assert asymmetry_pvalues(np.array([0.9, 0.8, 0.7])) == pytest.approx(0.25)
        assert asymmetry_pvalues(np.array([0.9, 0.8, 0.3])) == pytest.approx(0.5)

    def test_power(self) -> None:
        rng = np.random.default_rng(2)
        assert uniformity_pvalues(rng.beta(0.5, 0.5, 200)) < 1e-6
        assert uniformity_pvalues(rng.beta(2, 2, 200)) < 1e-4
        skewed, narrow = rng.beta(1.5, 1, 200), rng.beta(0.5, 0.5, 200)
        assert asymmetry_pvalues(skewed) < 1e-3 < 0.01 < asymmetry_pvalues(narrow)

    def test_holm(self) -> None:
        assert holm(np.array([0.02, np.nan, 0.01, 0.5]))[[0, 2, 3]].tolist() == [0.04, 0.03, 0.5]
        assert np.isnan(holm(np.array([np.nan])))[0]


class TestRanks:
    def pits(self, draw: Callable[[], Tensor], weight: Callable | None = None) -> np.ndarray:
        ties = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        found = []
        for _ in range(1500):
            draws = draw()
            weights = torch.ones(len(draws) - 1).double()
            weights = weights if weight is None else weight(draws[1:]).double()
            found.append(summary("z", draws[1:], draws[0], weights, ties)["pit"])
        return np.stack(found)

    @pytest.mark.parametrize(
        "draw", [lambda: torch.randn(10), lambda: torch.rand(10).round(), lambda: torch.zeros(10)]
    )
    def test_exchangeable(self, draw: Callable[[], Tensor]) -> None:
        """Also where draws are tied: with 9 draws each rank is as frequent."""
        pit = self.pits(draw)
        assert uniformity_pvalues(pit) > 0.01
        counts = np.bincount((pit * 10).astype(int), minlength=10)
        assert ((counts - 150) ** 2 / 150).sum() < 27.9  # chi-square, 9 degrees, 0.001

    def test_ranks_without_ties(self) -> None:
        draws = torch.arange(9.0).flip(0)
        ties = torch.Generator().manual_seed(0)
        for truth in (-1.0, 3.5, 9.0):
            found = summary("z", draws, torch.tensor(truth), torch.ones(9).double(), ties)
            assert math.floor(10 * found["pit"]) == sum(draws < truth)
        assert found["mean"] == pytest.approx(4.0)
        assert found["sd"] == pytest.approx(np.arange(9).std())

    def test_weighted(self) -> None:
        """Draws from a normal of sd 1.5, with the weights that make it 1."""

        def draw() -> Tensor:
            draws = 1.5 * torch.randn(400)
            draws[0] = torch.randn(())
            return draws

        normal = torch.distributions.Normal
        assert uniformity_pvalues(self.pits(draw)) < 1e-4
        weighted = self.pits(
            draw, lambda z: (normal(0.0, 1.0).log_prob(z) - normal(0.0, 1.5).log_prob(z)).exp()
        )
        assert uniformity_pvalues(weighted) > 0.01

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite(self, bad: float) -> None:
        draws, ties = torch.tensor([0.0, bad]), torch.Generator()
        with pytest.raises(DataError, match="site 'z': 1 of 2 draws are not finite"):
            summary("z", draws, torch.zeros(()), torch.ones(2).double(), ties)


class TestCalibrated:
    def test_passes(self, calibrated: pvi.SBC) -> None:
        assert calibrated.calibrated and "no miscalibration found" in str(calibrated)
        assert "240 simulations, 99 draws each" in repr(calibrated) and len(repr(calibrated)) < 200
        assert set(calibrated.ranks) == {"b", LOG_JOINT}
        assert calibrated.ranks["b"].shape == (240, 2)
        assert calibrated.ranks["b"].min() >= 0 and calibrated.ranks["b"].max() <= 99

    def test_false_alarms(self, calibrated: pvi.SBC) -> None:
        """Of p-values of 20 simulations each, a twentieth is below 0.05."""
        blocks = [x.reshape(12, 20, -1).swapaxes(0, 1) for x in calibrated.pit.values()]
        found = np.concatenate([uniformity_pvalues(x).reshape(-1) for x in blocks])
        se = math.sqrt(0.05 * 0.95 / len(found))
        assert len(found) == 36 and (found <= 0.05).mean() < 0.05 + 3 * se
        assert abs((found <= 0.5).mean() - 0.5) < 3 * 0.5 / math.sqrt(len(found))

    def test_known_moments(self, calibrated: pvi.SBC) -> None:
        sd = COV.diagonal().sqrt().numpy()
        se = sd / math.sqrt(2 * 99)  # of the sd of one fit's draws
        assert (np.abs(calibrated.sds["b"] - sd) < 5 * se).all()
        z = calibrated.zscores["b"]
        assert (np.abs(z.mean(0)) < 3 / math.sqrt(240)).all()
        # contraction of one fit: 1 - sd^2 / 1, with the sample's variance in the place of 1
        error = sd**2 * (2 / math.sqrt(2 * 99) + math.sqrt(2 / 239))
        assert (np.abs(np.median(calibrated.contraction["b"], 0) - (1 - sd**2)) < 3 * error).all()
        assert (np.abs(calibrated.truths["b"].mean(0)) < 3 / math.sqrt(240)).all()

    def test_coverage(self, calibrated: pvi.SBC, narrow: pvi.SBC) -> None:
        probs = [0.0, 0.5, 0.9, 1.0]
        cover = calibrated.coverage(probs)["b"]
        se = np.sqrt(np.array(probs) * (1 - np.array(probs)) / 240)
        assert cover.shape == (4, 2)
        assert (np.abs(cover - np.array(probs)[:, None]) <= 3.5 * se[:, None]).all()
        assert (narrow.coverage([0.9])["b"] < 0.8).all()
        assert len(narrow.coverage()["b"]) == 19
        with pytest.raises(DataError, match="probs"):
            calibrated.coverage([1.5])


class TestPlanted:
    def test_correlations_ignored(self, narrow: pvi.SBC) -> None:
        assert (narrow.adjusted["b"] < 1e-3).all() and narrow.pvalue < 1e-3
        assert {shape_of(u) for u in narrow.pit["b"].T} == {"U: too narrow"}
        assert "miscalibrated" in str(narrow) and "U (too narrow)" in str(narrow)

    @pytest.mark.parametrize(
        ("guide", "shape"), [(shifted, "slope: too high"), (widened, "inverse U: too wide")]
    )
    def test_shapes(self, guide: Callable, shape: str) -> None:
        found = run(guide, 90)
        assert (found.adjusted["b"] < 0.01).all()
        assert {shape_of(u) for u in found.pit["b"].T} == {shape}
        assert (found.asymmetry["b"] < 0.01).all() == (guide is shifted)

    def test_data_ignored(self) -> None:
        """Ranks of latents can't see it; those of the log joint density do."""
        found = run(halved)
        assert (found.adjusted["b"] > 0.05).all()
        assert found.adjusted[LOG_JOINT] < 0.01
        assert "not together" in str(found)

    def test_wrong_prior(self) -> None:
        found = run(simulator=wide_line)
        assert found.pvalue < 0.01 and not found.calibrated

    def test_weights_mend_it(self) -> None:
        found = run(widened, num_draws=400, correct="psis")
        assert found.pvalue > 0.05 and np.isfinite(found.khat).all()


class TestFits:
    @pytest.mark.parametrize(
        "guide",
        [
            pvi.guides.FullRank,
            lambda: pvi.guides.FullRank(line),
            pvi.guides.FullRank(),
        ],
    )
    def test_ways_to_give_a_guide(self, guide: Any) -> None:
        found = pvi.sbc(line, guide, (X, Y), num_simulations=4, **QUICK)
        reference = run(number=4)
        # the same simulated truths, and the posterior up to the Monte Carlo error of 99 draws
        assert np.array_equal(found.truths["b"], reference.truths["b"])
        far = (found.means["b"] - reference.means["b"]) / reference.sds["b"]
        assert np.abs(far).max() < 5 * math.sqrt(2 / 99)
        assert not found.unconverged

    def test_prototype_is_left_alone(self) -> None:
        guide = pvi.guides.MeanField()
        pvi.sbc(line, guide, (X, Y), num_simulations=2, **QUICK)
        assert not guide.latents

    def test_pyro_guides_and_options(self) -> None:
        found = pvi.sbc(
            line, lambda: AutoNormal(line), (X, Y), num_simulations=2, steps=20, **QUICK
        )
        assert found.pit["b"].shape == (2, 2) and len(found.unconverged) + 2 >= 2
        assert not pyro.get_param_store().keys()

    def test_amortised(self) -> None:
        guide = pvi.guides.Amortized(Encoder())
        fit = pvi.fit(local, guide, torch.zeros(6, 1), steps=1, lr=1e-6, seed=0, progress=False)
        found = pvi.sbc(local, fit, num_simulations=30, **QUICK)
        assert found.calibrated and found.dims["z"] == ("data", "z_dim_1")
        assert found.pit["z"].shape == (30, 6, 1)

    def test_discrete_sites(self) -> None:
        options: dict[str, Any] = {"num_simulations": 4, "steps": 60, **QUICK}
        found = pvi.sbc(coins, None, torch.zeros(5), **options)
        assert set(found.ranks) == {"share", "k", LOG_JOINT}
        assert set(np.unique(found.truths["k"])) == {0.0, 1.0}
        assert np.isfinite(found.truths[LOG_JOINT]).all()

    def test_data_in_the_model(self) -> None:
        y = torch.zeros(10)
        found = pvi.sbc(lambda: line(X, y), pvi.guides.FullRank, num_simulations=3, **QUICK)
        reference = pvi.sbc(line, pvi.guides.FullRank, (X, Y), num_simulations=3, **QUICK)
        assert np.array_equal(found.ranks["b"], reference.ranks["b"])

    def test_deterministic_of_data(self) -> None:
        """It is made from the simulated observations, for the truth as for the draws."""
        seen: list[float] = []

        def left(latents: Any, data: Any) -> Tensor:
            mine = (data["y"] - latents["b"] * data["x"][:, 0]).sum()
            seen.append(float(mine - latents["left"].sum()))
            return mine

        found = pvi.sbc(residual, None, (X, Y), num_simulations=2, quantities={"q": left}, **QUICK)
        assert max(map(abs, seen)) < 1e-4 and len(seen) == 2 * 100
        assert np.allclose(found.truths["q"], found.truths["left"][:, 0], atol=1e-4)

    def test_reparam(self) -> None:
        def centred(y: Tensor) -> None:
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                theta = pyro.sample("theta", dist.Normal(mu, 1.0))
                pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

        options: Any = {"reparam": "noncentered", "num_simulations": 2, **QUICK}
        found = pvi.sbc(centred, pvi.guides.FullRank, torch.zeros(3), **options)
        assert set(found.pit) == {"mu", "theta"} and "log_joint is left out" in str(found)


class TestReport:
    def test_datatree(self, calibrated: pvi.SBC) -> None:
        tree = calibrated.to_datatree()
        assert tree["prior_sbc"]["b"].dims == ("chain", "draw", "b_dim_0")
        assert np.array_equal(tree["prior_sbc"]["b"].values[0], calibrated.pit["b"])
        assert np.array_equal(tree["sbc_stats"]["b_rank"].values[0], calibrated.ranks["b"])

    def test_arviz(self, calibrated: pvi.SBC) -> None:
        arviz: Any = load()
        data = calibrated.to_arviz()
        if arviz.__version__.startswith("0."):
            assert "prior_sbc" in data.groups()
            rows = arviz.summary(data, group="prior", var_names=["b"], kind="stats")
            assert len(rows) == 2
        else:
            from matplotlib import pyplot

            collection = arviz.plot_ecdf_pit(data, backend="matplotlib")
            pyplot.close(collection.get_viz("figure"))

    def test_plot(self, narrow: pvi.SBC) -> None:
        figure = narrow.plot()
        assert len(figure.axes) == 9
        assert [axes.get_ylabel() for axes in figure.axes[::3]][-1] == LOG_JOINT
        assert len(narrow.plot(["b"]).axes) == 6
        with pytest.raises(DataError, match="no site 'c'"):
            narrow.plot(["c"])
        with pytest.raises(PviError, match=r"expected values \(N,\) in \[0, 1\]"):
            plot_calibration({"b": np.array([2.0])})
        assert new_figure(1, 1) is not figure

    def test_lines_outside_are_red(self, narrow: pvi.SBC, calibrated: pvi.SBC) -> None:
        def colors(found: pvi.SBC) -> list[str]:
            return [str(axes.lines[-1].get_color()) for axes in found.plot(["b"]).axes[1::3]]

        assert colors(narrow) == ["#d62728"] * 2 and colors(calibrated) == ["#1f77b4"] * 2

    def test_many_scalars(self, calibrated: pvi.SBC) -> None:
        pit = {"b": np.random.default_rng(0).random((240, 30))}
        wide = {"b": np.ones((240, 30)) * np.arange(240)[:, None]}
        changed = {"pit": pit, "truths": wide, "means": wide, "sds": wide}
        found = dataclasses.replace(calibrated, **changed)
        assert "18 more rows" in str(found) and len(found.plot().axes) == 18

    def test_constants_do_not_count(self, calibrated: pvi.SBC) -> None:
        flat = {"b": np.ones((240, 2))}
        changed = {"truths": calibrated.truths | flat, "sds": calibrated.sds | {"b": 0 * flat["b"]}}
        found = dataclasses.replace(calibrated, **changed)
        assert np.isnan(found.pvalues["b"]).all() and "1 scalar," in str(found)
        assert found.pvalue == found.pvalues[LOG_JOINT]


class TestFailures:
    def test_are_kept(self) -> None:
        def fails(latents: Any, data: Any) -> Tensor:
            if data["y"][0] > 1:
                raise RuntimeError("too much\nand more")
            return latents["b"][0]

        found = run(number=30, quantities={"q": fails})
        failed, ended = len(found.failures), len(found.numbers)
        assert failed + ended == 30 and 0 < failed < 30
        assert set(found.failures.values()) == {"RuntimeError: too much"}
        assert found.pit["q"].shape == (ended,)
        assert f"warning: {failed} of 30 failed" in str(found)

    def test_all(self) -> None:
        def fails(latents: Any, data: Any) -> Tensor:
            raise RuntimeError("always")

        with pytest.raises(FitError, match="first 5 simulations failed: RuntimeError: always"):
            run(number=30, quantities={"q": fails})
        with pytest.raises(FitError, match="every simulation failed"):
            run(number=2, quantities={"q": fails})

    def test_interrupt(self) -> None:
        count = iter(range(1000))

        def stops(latents: Any, data: Any) -> Tensor:
            if next(count) == 450:  # in the fifth simulation, of 100 calls each
                raise KeyboardInterrupt
            return latents["b"][0]

        found = run(number=30, quantities={"q": stops})
        assert len(found.numbers) == 4 and found.notes == ("interrupted after 4 of 30 simulations",)

    def test_unconverged(self) -> None:
        found = pvi.sbc(line, None, (X, Y), num_simulations=2, optimizer="adam", steps=3, **QUICK)
        assert len(found.unconverged) == 2 and "warning: 2 of 2 did not converge" in str(found)


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "guide", "data", "options", "error", "message"),
        [
            (series, None, torch.ones(9), {}, ModelError, "'y' has another density.*simulator="),
            (line, None, (X, Y), {"simulator": renamed}, ModelError, "no site 'b'"),
            (part, None, torch.ones(9), {}, ModelError, "2 of 9 elements.*batch_size="),
            (line, None, (X,), {"kwargs": {"y": None}}, ModelError, "no observed site"),
            (line, None, (X, Y), {"stepz": 3}, FitError, "stepz"),
            (line, None, (X, Y), {"correct": "is"}, FitError, "correct must be None or 'psis'"),
            (line, None, (X, Y), {"sites": ["a"]}, DataError, "no site 'a'"),
            (line, None, (X, Y), {"quantities": {"b": len}}, DataError, r"quantities\['b'\]"),
            (line, "FullRank", (X, Y), {}, GuideError, "got str"),
            (line, lambda: 3, (X, Y), {}, FitError, "it returned int"),
            (line, None, (X, Y), {"num_simulations": 0}, FitError, "num_simulations"),
        ],
    )
    def test_arguments(
        self,
        model: Any,
        guide: Any,
        data: Any,
        options: dict[str, Any],
        error: type[Exception],
        message: str,
    ) -> None:
        with pytest.raises(error, match=message):
            pvi.sbc(model, guide, data, **{"num_simulations": 5} | QUICK | options)

    def test_guide_that_ignores_data(self) -> None:
        fit = pvi.fit(line, None, (X, Y), seed=0, progress=False)
        with pytest.raises(GuideError, match="same draws whatever the data"):
            pvi.sbc(line, fit, **QUICK)
        with pytest.raises(ModelError, match="another model"):
            pvi.sbc(wide_line, fit, **QUICK)
        with pytest.raises(FitError, match="not fitted again: leave out steps"):
            pvi.sbc(line, fit, steps=3, **QUICK)

    def test_parameters_in_the_model(self) -> None:
        def model(y: Tensor) -> None:
            scale = pyro.param("scale", torch.tensor(1.0))
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu, scale).expand([3]).to_event(1), obs=y)

        with pytest.raises(ModelError, match=r"parameters of its own \(.*scale"):
            pvi.sbc(model, None, torch.zeros(3), **QUICK)
        assert not pyro.get_param_store().keys()


class TestFolder:
    def test_goes_on(self, tmp_path: Path) -> None:
        calls: list[int] = []

        def counted(latents: Any, data: Any) -> Tensor:
            calls.append(1)
            return latents["b"][0]

        options: dict[str, Any] = {"quantities": {"q": counted}, "path": tmp_path}
        run(number=3, **options)
        (tmp_path / "simulation-000001" / "tensors.safetensors").write_bytes(b"cut off")
        found = run(number=6, **options | {"seed": None})
        assert len(calls) == 100 * (3 + 1 + 3)  # the damaged one again, and the new ones
        whole = run(number=6, quantities={"q": counted})
        assert found.seed == whole.seed == 0
        assert all(np.array_equal(found.pit[n], whole.pit[n]) for n in whole.pit)

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"num_draws": 50}, "num_draws"),
            ({"seed": 1}, "seed"),
            ({"correct": "psis"}, "correct"),
            ({"simulator": wide_line}, "truth"),
            ({"guide": halved}, "guide"),
        ],
    )
    def test_of_others(self, change: dict[str, Any], what: str, tmp_path: Path) -> None:
        run(number=1, path=tmp_path)
        with pytest.raises(CheckpointError, match=f"{what} was"):
            run(number=1, path=tmp_path, **change)

    def test_failures_are_saved(self, tmp_path: Path) -> None:
        def fails(latents: Any, data: Any) -> Tensor:
            if data["y"][0] > 1:
                raise RuntimeError("too much")
            return latents["b"][0]

        first, again = (run(number=20, quantities={"q": fails}, path=tmp_path) for _ in range(2))
        assert first.failures == again.failures != {}

    def test_full_folder(self, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="holds other files"):
            run(number=1, path=tmp_path)


class TestWorkers:
    @pytest.mark.parametrize("way", ["spawn", "fork"])
    def test_number_changes_nothing(self, way: str) -> None:
        quantities = {"q": lambda latents, data: latents["b"][0]} if way == "fork" else {}
        options: dict[str, Any] = {"num_simulations": 3, "quantities": quantities, **QUICK}
        many = pvi.sbc(line, pvi.guides.FullRank, (X, Y), num_workers=2, **options)
        alone = pvi.sbc(line, pvi.guides.FullRank, (X, Y), **options)
        assert all(np.array_equal(many.pit[n], alone.pit[n]) for n in alone.pit)
        assert bool(many.notes) == (way == "fork") and "forked" in " ".join([*many.notes, "forked"])

    def test_caller_keeps_its_random_state(self) -> None:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        run(number=2)
        assert torch.equal(before, torch.get_rng_state())
