"""Verdicts of `diagnose` on normal targets and guides, where every number is known."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributions import Normal

from pvi.diagnostics import Diagnosis, diagnose
from pvi.errors import PviError

MODES = "cannot see modes"


@dataclass
class FakePosterior:
    """Independent N(0, 1) guide draws; `log_ratio` of the draws `(S, D)` makes the target."""

    log_ratio: Callable[[torch.Tensor], torch.Tensor]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"theta": ()})
    reasons: list[str] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    def _draw(self, num_draws: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.asked.append(num_draws)
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(num_draws, sum(sizes.values()), generator=generator)
        parts = z.split(list(sizes.values()), 1)
        shaped = zip(self.shapes.items(), parts, strict=True)
        return z, {name: part.reshape(num_draws, *shape) for (name, shape), part in shaped}

    def dependent_latents(self) -> list[str]:
        return []

    @property
    def runner(self) -> Any:
        nodes = {n: {"fn": Normal(torch.zeros(s), 1.0)} for n, s in self.shapes.items()}
        return SimpleNamespace(model_trace=SimpleNamespace(nodes=nodes))

    def sample(self, num_draws: int, *, seed: int) -> dict[str, torch.Tensor]:
        # like Posterior, with deterministic sites: these are no latent dimensions
        return {**self._draw(num_draws, seed)[1], "fitted": torch.zeros(num_draws, 3000)}

    def draws(self, num_draws: int, *, seed: int) -> Any:
        z, values = self._draw(num_draws, seed)
        log_q = -0.5 * (z**2).sum(1)
        return SimpleNamespace(values=values, log_p=log_q + self.log_ratio(z), log_q=log_q)

    def caveats(self) -> list[str]:
        return self.reasons


def moved(by: float, log_z: float = 0.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Target N(by, 1) in every dimension."""
    return lambda z: (by * z - by**2 / 2).sum(1) + log_z


def wide(guide_sd: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Target wider than the guide by 1 / guide_sd in every dimension."""
    return lambda z: (0.5 * (1 - guide_sd**2) * z**2 + math.log(guide_sd)).sum(1)


def correlated(rho: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Target with unit variances whose dimensions 0 and 2 correlate by rho."""
    return lambda z: (
        -0.5 * (z[:, 0] ** 2 + z[:, 2] ** 2 - 2 * rho * z[:, 0] * z[:, 2]) / (1 - rho**2)
        + 0.5 * (z[:, 0] ** 2 + z[:, 2] ** 2)
    )


def reasons(diagnosis: Diagnosis) -> str:
    return "\n".join(diagnosis.reasons)


def test_exact_guide_is_good() -> None:
    got = diagnose(FakePosterior(lambda z: torch.full((len(z),), -7.5)))
    assert got.verdict == "good"
    assert "below 0.1" in reasons(got)
    assert got.num_draws == 20_000
    assert got.ess == pytest.approx(20_000)
    assert (got.bound, got.evidence) == pytest.approx((-7.5, -7.5), abs=1e-5)
    assert got.sd_log_ratio == pytest.approx(0, abs=1e-5)
    assert got.table[0].shift == pytest.approx(0, abs=1e-5)
    assert got.table[0].sd_ratio == pytest.approx(1, abs=1e-5)


def test_nearly_constant_ratios_are_good_whatever_khat() -> None:
    for by in (0.05, 0.095):
        assert "sd 0.0" in diagnose(FakePosterior(moved(by))).reasons[0]
    few = diagnose(FakePosterior(moved(0.05)), 15)
    assert few.khat == math.inf
    assert few.verdict == "good"
    assert few.evidence == pytest.approx(0, abs=0.1)
    assert diagnose(FakePosterior(moved(0.13))).verdict == "correctable"


def test_many_small_shifts_are_good_by_the_weights() -> None:
    got = diagnose(FakePosterior(moved(0.04), {"theta": (20,)}))
    assert got.sd_log_ratio == pytest.approx(0.04 * math.sqrt(20), rel=0.05)
    assert got.sd_log_ratio > 0.1
    assert got.verdict == "good"
    assert "no mean by 0.1 sd" in reasons(got)


def test_shifted_guide_is_correctable() -> None:
    got = diagnose(FakePosterior(moved(0.7, log_z=3.0)))
    assert got.verdict == "correctable"
    assert "theta by +0.7" in reasons(got)
    assert "PSIS-weighted draws" in reasons(got)
    row = got.table[0]
    assert row.mean == pytest.approx(0, abs=0.02)
    assert row.psis_mean == pytest.approx(0.7, abs=0.03)
    assert row.shift == pytest.approx(0.7, abs=0.03)
    assert row.sd_ratio == pytest.approx(1, abs=0.05)
    assert got.bound == pytest.approx(3 - 0.7**2 / 2, abs=4 * got.bound_se)
    assert got.bound_se == pytest.approx(0.7 / math.sqrt(20_000), rel=0.05)
    assert got.evidence == pytest.approx(3, abs=0.03)


def test_wrong_sd_alone_is_correctable() -> None:
    got = diagnose(FakePosterior(wide(0.8)))
    assert got.verdict == "correctable"
    assert abs(got.table[0].shift) < 0.1
    assert got.table[0].sd_ratio == pytest.approx(1.25, abs=0.06)
    assert "multiply its sd by 1.2" in reasons(got)


def test_light_tails_are_unreliable() -> None:
    got = diagnose(FakePosterior(wide(0.3)))
    assert got.verdict == "unreliable"
    assert got.khat > 0.7
    assert math.isnan(got.evidence)
    assert "is above 0.70" in reasons(got)
    assert "pvi.guides.FullRank" in reasons(got)


def test_low_relative_ess_is_unreliable() -> None:
    got = diagnose(FakePosterior(moved(2.0)))
    assert got.verdict == "unreliable"
    assert got.ess < 2000
    assert "below 10 % of 20,000 draws" in reasons(got)


def test_few_draws_need_more() -> None:
    got = diagnose(FakePosterior(moved(0.5)), 300)
    assert got.verdict == "unreliable"
    assert "below 400: raise num_draws to" in reasons(got)
    assert "noisy at 300 draws" in reasons(got)
    assert diagnose(FakePosterior(moved(0.5)), 600).verdict == "correctable"


def test_tiny_num_draws() -> None:
    got = diagnose(FakePosterior(moved(0.5)), 10)
    assert got.verdict == "unreliable"
    assert "fewer than 5 draws: raise num_draws" in reasons(got)
    with pytest.raises(PviError, match="num_draws >= 2"):
        diagnose(FakePosterior(moved(0.5)), 1)


def test_caveats_are_not_assessed() -> None:
    posterior = FakePosterior(moved(0.5), {"mu": ()}, ["the guide has a Delta site 'mu'"])
    got = diagnose(posterior)
    assert got.verdict == "not assessed"
    assert got.reasons == ("the guide has a Delta site 'mu'",)
    assert max(posterior.asked) == got.num_draws == 1000
    assert all(math.isnan(x) for x in (got.khat, got.ess, got.bound, got.evidence))
    assert got.table[0].mean == pytest.approx(0, abs=0.1)
    assert got.table[0].sd == pytest.approx(1, abs=0.1)
    assert math.isnan(got.table[0].shift)
    assert str(got).startswith("not assessed\n")
    assert MODES in str(got)


def test_large_latent_spaces_are_not_assessed() -> None:
    posterior = FakePosterior(moved(0.01), {"w": (40, 30), "b": ()})
    got = diagnose(posterior)
    assert got.verdict == "not assessed"
    assert "1,201 dimensions" in reasons(got)
    assert "predictive checks" in reasons(got)
    assert max(posterior.asked) == got.num_draws == 200
    assert math.isnan(got.khat)
    assert got.bound == pytest.approx(-1201 * 0.01**2 / 2, abs=4 * got.bound_se)
    assert len(got.table) == 1000
    assert "(988 more rows)" in str(got)
    assert "nan" not in str(got)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_ratios_are_counted(bad: float) -> None:
    got = diagnose(FakePosterior(lambda z: torch.where(torch.arange(len(z)) < 3, bad, z[:, 0])))
    assert got.verdict == "not assessed"
    assert "3 of 20,000 log ratios are NaN or +inf" in reasons(got)
    assert math.isnan(got.bound)
    assert math.isnan(got.bound_se)


def test_draws_outside_the_support() -> None:
    got = diagnose(FakePosterior(lambda z: torch.where(z[:, 0] > 0, 0.0, -math.inf)))
    assert got.verdict == "correctable"
    assert "outside the model's support, so the bound is -inf" in reasons(got)
    assert got.bound == -math.inf
    assert got.sd_log_ratio == math.inf
    assert got.evidence == pytest.approx(math.log(0.5), abs=0.03)
    assert got.table[0].psis_mean == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)
    nowhere = diagnose(FakePosterior(lambda z: torch.full((len(z),), -math.inf)))
    assert nowhere.verdict == "not assessed"
    assert "no draw is inside" in reasons(nowhere)


@pytest.mark.parametrize("rho", [0.7, 0.95])
def test_names_the_correlated_pair(rho: float) -> None:
    got = diagnose(FakePosterior(correlated(rho), {"a": (2,), "b": (1, 1), "c": ()}))
    pair = [r for r in got.reasons if "correlate" in r]
    assert len(pair) == 1
    assert pair[0].startswith("joint statements are off: a[0] and b[0, 0] correlate +0.")
    assert "pvi.guides.FullRank" in pair[0]


@pytest.mark.parametrize("seed", range(3))
def test_heavy_weights_do_not_invent_correlations(seed: int) -> None:
    got = diagnose(FakePosterior(wide(0.8), {"theta": (100,)}), seed=seed)
    assert got.verdict == "unreliable"
    assert got.ess < 200
    assert "correlate" not in reasons(got)


def test_constant_scalars_neither_shift_nor_correlate() -> None:
    class WithConstants(FakePosterior):
        def draws(self, num_draws: int, *, seed: int) -> Any:
            draws = super().draws(num_draws, seed=seed)
            constants = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
            draws.values["one"] = constants.expand(num_draws, 9)
            return draws

    got = diagnose(WithConstants(moved(0.5)), 4096)  # 1/4096 is exact: the guide's sds are 0
    assert [(r.shift, r.sd_ratio) for r in got.table[1:]] == [(0.0, 1.0)] * 9
    assert "correlate" not in reasons(got)


@pytest.mark.parametrize(
    ("by", "verdict", "place", "step"),
    [(0.0, "good", -1, "no harm"), (0.7, "correctable", 0, "max steps")],
)
def test_unconverged_fits_say_so(by: float, verdict: str, place: int, step: str) -> None:
    fit = SimpleNamespace(posterior=FakePosterior(moved(by)), converged=False, reason="max steps")
    got = diagnose(fit)
    assert got.verdict == verdict
    assert got.reasons[place].startswith("stopped before converging: max steps")
    assert step in got.reasons[place]
    for converged in (None, True):
        fit.converged = converged
        assert "stopped" not in reasons(diagnose(fit, 1000))


def test_seed_decides_the_numbers() -> None:
    first, same, other = (diagnose(FakePosterior(moved(0.5)), 500, seed=s) for s in (1, 1, 2))
    assert first == same
    assert first.bound != other.bound


def test_printed_report() -> None:
    def some(z: torch.Tensor) -> torch.Tensor:
        return 0.6 * z[:, 17] - 0.18 + 0.05 * z[:, 2]

    got = diagnose(FakePosterior(some, {"beta": (2, 10), "tau": ()}), 4000)
    lines = str(got).splitlines()
    assert lines[0].startswith("correctable: khat ")
    for part in ("ESS ", "of 4,000 draws", "bound -0.", "nats", "log evidence", "sd of log ratio"):
        assert part in lines[0]
    assert [line for line in lines if line.startswith("- ")] == [f"- {r}" for r in got.reasons]
    top = lines.index(next(line for line in lines if line.startswith("name ")))
    assert lines[top + 1].startswith("beta[1, 7]")
    assert lines[-2] == "(9 more rows, none with a larger shift)"
    assert MODES in lines[-1]
    assert len(lines) == top + 1 + 12 + 2
    assert max(map(len, lines[top:-2])) < 100


def test_to_pandas() -> None:
    pytest.importorskip("pandas")
    got = diagnose(FakePosterior(moved(0.5), {"beta": (2,), "tau": ()}), 1000)
    frame = got.to_pandas()
    assert list(frame.index) == ["beta[0]", "beta[1]", "tau"]
    assert frame.loc["tau", "shift"] == got.table[2].shift


def test_right_marginals_without_the_correlation_are_only_correctable() -> None:
    """Independent draws with the target's own marginals: nothing shifts, yet pairs are wrong."""
    torch.manual_seed(0)
    z = torch.randn(20_000, 2, dtype=torch.float64)
    corr = 0.6
    scale = torch.linalg.cholesky(torch.tensor([[1.0, corr], [corr, 1.0]], dtype=torch.float64))
    zero = torch.zeros(2, dtype=torch.float64)
    log_p = torch.distributions.MultivariateNormal(zero, scale_tril=scale).log_prob(z)
    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    draws = SimpleNamespace(values={"z": z}, log_p=log_p, log_q=log_q)
    small = SimpleNamespace(values={"z": z[:2]}, log_p=log_p[:2], log_q=log_q[:2])
    posterior = SimpleNamespace(
        caveats=list,
        dependent_latents=list,
        runner=SimpleNamespace(model_trace=SimpleNamespace(nodes={})),
        draws=lambda n, *, seed: draws if n == len(z) else small,
    )
    diagnosis = diagnose(posterior)
    assert diagnosis.verdict == "correctable"
    assert any("z[0] and z[1] correlate +0.6" in reason for reason in diagnosis.reasons)


def test_names_a_correlated_pair_beyond_the_first_scalars() -> None:
    def pair(z: torch.Tensor) -> torch.Tensor:
        return correlated(0.8)(z[:, 200:])

    got = diagnose(FakePosterior(pair, {"a": (201,), "b": (10,)}))
    assert got.verdict == "correctable"
    assert any("a[200] and b[1] correlate +0." in reason for reason in got.reasons)


def test_a_guide_on_its_way_is_told_from_one_that_has_arrived() -> None:
    """The bound of N(by, 1) rises by `by` nats for each sd; that of a narrow guide with its scale;
    and independent normals with the precisions of a correlated posterior are the best there are.
    """
    shifted = diagnose(FakePosterior(moved(2.0), {"a": (), "b": (3,)}))
    assert "not at the optimum: the bound still rises by 2" in reasons(shifted)
    narrow = diagnose(FakePosterior(wide(0.5)))
    assert "the guide is too narrow" in reasons(narrow)
    rho = 0.9
    cov = torch.tensor([[1.0, rho], [rho, 1.0]]) / (1 - rho**2)  # conditional sds are 1
    target = torch.distributions.MultivariateNormal(torch.zeros(2), cov)
    best = diagnose(
        FakePosterior(
            lambda z: target.log_prob(z) - Normal(0.0, 1.0).log_prob(z).sum(1), {"a": (2,)}
        )
    )
    assert best.verdict == "unreliable"
    assert "level in the guide's location and scale" in reasons(best)
    assert "not at the optimum" not in reasons(best)


def test_the_search_for_the_optimum_is_in_unbounded_space() -> None:
    """A log-normal guide at its optimum, whose draws are skewed: nothing rises."""

    class Positive(FakePosterior):
        def draws(self, num_draws: int, *, seed: int) -> Any:
            draws = super().draws(num_draws, seed=seed)
            draws.values["theta"] = draws.values["theta"].exp()
            return draws

        @property
        def runner(self) -> Any:
            prior = torch.distributions.LogNormal(0.0, 1.0)
            return SimpleNamespace(model_trace=SimpleNamespace(nodes={"theta": {"fn": prior}}))

    cubic = diagnose(Positive(lambda z: 0.15 * (z[:, 0] ** 3 - 3 * z[:, 0]).clamp(-8, 8)))
    assert cubic.verdict != "good"
    assert "level in the guide's location" in reasons(cubic)


@pytest.mark.parametrize("df", [3.0, 5.0, 10.0])
def test_heavy_tails_of_one_scalar_among_many(df: float) -> None:
    """Student's t instead of a normal in the last of 20 scalars: never good where its sd is off by
    over 10 %, and named.
    """
    target, scale = torch.distributions.StudentT(df), {3.0: 1.26, 5.0: 1.165, 10.0: 1.09}[df]

    def ratio(z: torch.Tensor) -> torch.Tensor:
        last = z[:, -1]
        return target.log_prob(last * scale) + math.log(scale) - Normal(0.0, 1.0).log_prob(last)

    found = [diagnose(FakePosterior(ratio, {"x": (20,)}), seed=seed) for seed in range(5)]
    error = 1 - scale / math.sqrt(df / (df - 2))
    if error > 0.1:
        assert all(d.verdict == "unreliable" for d in found)
        assert all("at extreme values of x[19]" in reasons(d) for d in found)
    for d in found:
        assert d.verdict != "good" or error < 0.1
