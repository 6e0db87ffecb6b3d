"""How a step is made: batches, clipping, precision, groups, schedulers, validation, callbacks."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvi
from pvi.errors import DataError, FitError, GuideError
from pvi.fit import drift
from pvi.fit.precision import raised
from tests.scenarios import local_model, mean_model, randn

pytestmark = pytest.mark.usefixtures("isolated")
X = randn(24).double() + 1.0


def sgd(lr: float = 1e-3) -> Any:
    return lambda p: torch.optim.SGD(p, lr=lr)


def values(fit: pvi.Fit) -> dict[str, Tensor]:
    with fit.posterior.params.scope():
        return {k: x.detach().clone() for k, x in fit.posterior.params.tensors().items()}


def run(**options: Any) -> pvi.Fit:
    given = {"model": mean_model, "data": X, "seed": 0, "progress": False}
    return pvi.fit(**{**given, **options})


def point(x: Tensor) -> None:
    """A guide without noise worth the name, so that steps can be compared."""
    pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1e-30))


class Net(nn.Module):
    """A small autoencoder, its encoder apart."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 6))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


def autoencoder(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, Tensor]:
    torch.set_default_dtype(dtype)
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    x = randn(60, 2).to(dtype) @ randn(2, 6, seed=1).to(dtype)
    return Net(), pvi.guides.Amortized(encoder), x


class TestAccumulate:
    def test_gradient_is_that_of_the_larger_batch(self) -> None:
        """Two halves a step are the whole: the same rows, in a model without noise."""
        options = {"guide": point, "optimizer": sgd(), "epochs": 1, "objective": pvi.ELBO()}
        halves = run(batch_size=12, accumulate=2, **options)
        whole = run(steps=1, **{k: v for k, v in options.items() if k != "epochs"})
        assert len(halves.history) == 1
        for name in ("bound", "loss", "grad_norm"):
            assert halves.history[name] == pytest.approx(whole.history[name], rel=1e-10)
        assert float(values(halves)["param:loc"]) == pytest.approx(
            float(values(whole)["param:loc"]), rel=1e-12
        )
        assert float(values(halves)["param:loc"]) != 0.3

    def test_epochs(self) -> None:
        assert len(run(batch_size=5, accumulate=2, epochs=3).history) == 6  # of 4 batches each

    @pytest.mark.parametrize("value", [0, 1.5, None, True])
    def test_refused(self, value: Any) -> None:
        with pytest.raises(FitError, match="accumulate must be a whole number >= 1"):
            run(accumulate=value, steps=2)


def test_clip_norm() -> None:
    """The step is shorter, the record is of the whole gradient."""
    far = {"steps": 1, "objective": pvi.ELBO(), "guide": point}
    free = run(**far, optimizer=sgd(1.0))
    clipped = run(**far, optimizer=sgd(1.0), clip_norm=0.01)
    assert clipped.history["grad_norm"] == free.history["grad_norm"] > 1.0
    assert abs(float(values(clipped)["param:loc"]) - 0.3) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(FitError, match="clip_norm must be a number > 0, got -1"):
        run(clip_norm=-1)


class TestPrecision:
    def test_bound_agrees(self) -> None:
        """With the same parameters and noise, up to the 8 bits of bfloat16 in the networks."""
        model, guide, x = autoencoder()
        options = {"model": model, "guide": guide, "data": x, "steps": 1, "optimizer": sgd(0.0)}
        single, low = run(**options), run(**options, precision="bf16")
        one, two = single.history["bound"][0], low.history["bound"][0]
        assert one != two
        assert two == pytest.approx(one, rel=2.0**-8)
        norms = [fit.history["grad_norm"][0] for fit in (single, low)]
        assert norms[1] == pytest.approx(norms[0], rel=0.05)

    def test_trains(self) -> None:
        model, guide, x = autoencoder()
        dtypes: set[torch.dtype] = set()
        assert isinstance(model, Net)
        hook = lambda module, args, out: (  # noqa: E731
            dtypes.add(out.dtype) if module.training else None
        )
        handle = model.decoder.register_forward_hook(hook)
        options = {"epochs": 60, "batch_size": 20}
        fit = run(model=model, guide=guide, data=x, **options, precision="bf16")
        handle.remove()
        assert dtypes == {torch.bfloat16}
        assert all(p.dtype == torch.float32 for p in values(fit).values())
        assert fit.posterior.sample(3, seed=0)["z"].dtype == torch.float32
        model, guide, x = autoencoder()
        single = run(model=model, guide=guide, data=x, **options)
        first, last = single.history["bound"][:20].mean(), single.history["bound"][-50:].mean()
        assert abs(fit.history["bound"][-50:].mean() - last) < 0.05 * (last - first)

    def test_linear_algebra_of_guides_stays(self) -> None:
        """A full-rank guide's products are exact: only networks are in bfloat16."""
        torch.set_default_dtype(torch.float32)

        def model(x: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 1.0), obs=x.sum(-1))

        options = {"model": model, "guide": pvi.guides.FullRank, "data": randn(30, 3).float()}
        one, two = (run(**options, steps=30, precision=p) for p in (None, "bf16"))
        assert one.history["bound"] == pytest.approx(two.history["bound"], rel=1e-6)

    def test_nested_distributions(self) -> None:
        low = torch.zeros(3, dtype=torch.bfloat16)
        fn = dist.TransformedDistribution(
            dist.Normal(low, 1.0), [dist.transforms.AffineTransform(low, 2.0)]
        )
        new = raised(fn.to_event(1))
        assert new.base_dist.base_dist.loc.dtype == torch.float32
        assert new.rsample().dtype == torch.float32
        assert raised(new) is new
        assert raised(dist.Categorical(logits=low)).logits.dtype == torch.float32

    def test_refused(self) -> None:
        with pytest.raises(FitError, match="needs parameters in float32, but they are float64"):
            run(steps=2, precision="bf16")
        with pytest.raises(FitError, match="precision must be None or 'bf16', got 'fp16'"):
            run(steps=2, precision="fp16")


class TestOptimizers:
    def test_rates_by_pattern(self) -> None:
        model, guide, x = autoencoder()
        groups: list[Any] = []

        def adam(given: list[Any]) -> torch.optim.Optimizer:
            groups.extend(dict(group) for group in given)
            return torch.optim.Adam(given)

        options = {"model": model, "guide": guide, "data": x, "steps": 2}
        rates = {"model:decoder.0.*": 0.5, "guide:*": 0.25}
        fit = run(**options, optimizer=adam, lr=rates)
        named = [(g.get("name"), g.get("lr"), len(g["params"])) for g in groups]
        expected = {(None, None, 2), ("guide:*", 0.25, 4), ("model:decoder.0.*", 0.5, 2)}
        assert set(named) == expected
        before = {k: v.clone() for k, v in values(fit).items()}
        fit = run(**options, lr={"*": 1e-9})
        change = {k: float((v - before[k]).abs().max()) for k, v in values(fit).items()}
        assert max(change.values()) < 1e-7

    def test_pattern_without_parameter(self) -> None:
        with pytest.raises(FitError, match=r"'model:\*' fits no parameter.*guide:loc.mu"):
            run(lr={"model:*": 0.1}, steps=2)
        with pytest.raises(FitError, match="lr must be a number > 0, got -1 for 'guide"):
            run(lr={"guide:*": -1}, steps=2)

    def test_ready_optimizer(self) -> None:
        guide = pvi.guides.MeanField(mean_model).setup(X)
        fit = run(guide=guide, optimizer=torch.optim.Adam(guide.parameters(), lr=0.02), steps=5)
        assert fit.history["lr"].tolist() == [0.02] * 5
        assert not torch.equal(fit.guide.mean()["mu"], torch.zeros(()))  # type: ignore[attr-defined]

    def test_ready_optimizer_of_other_parameters(self) -> None:
        guide = pvi.guides.MeanField(mean_model).setup(X)
        first, *_ = guide.parameters()
        with pytest.raises(FitError, match=r"does not train 'guide:.*requires_grad_"):
            run(guide=guide, optimizer=torch.optim.Adam([first]), steps=5)
        other = torch.optim.Adam([*guide.parameters(), torch.zeros(2, requires_grad=True)])
        with pytest.raises(FitError, match="1 parameters that are none of this model or guide"):
            run(guide=guide, optimizer=other, steps=5)

    @pytest.mark.parametrize("name", ["AdamW", "RMSprop", "NAdam", "Adagrad", "Adamax", "RAdam"])
    def test_any_of_torch(self, name: str) -> None:
        fit = run(optimizer=lambda p: getattr(torch.optim, name)(p, lr=0.02), steps=200)
        assert fit.history["bound"][-20:].mean() > fit.history["bound"][0]

    def test_closures(self) -> None:
        with pytest.raises(FitError, match=r"LBFGS runs the loss several times.*drawn anew"):
            run(optimizer=lambda p: torch.optim.LBFGS(p), steps=2)

    def test_scheduler(self) -> None:
        """After every step, for an optimiser of one's own and for "auto"."""
        steps = lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)  # noqa: E731
        for optimizer, lr in (("auto", 0.1), (sgd(0.1), None)):
            fit = run(optimizer=optimizer, lr=lr, scheduler=steps, steps=5)
            assert fit.history["lr"] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])

    def test_scheduler_on_validation(self) -> None:
        never = {"patience": 0, "threshold": 1e9, "threshold_mode": "abs"}
        reduce = lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, **never)  # noqa: E731
        with pytest.raises(FitError, match="ReduceLROnPlateau reacts to a validation bound"):
            run(scheduler=reduce, steps=2)
        with pytest.raises(FitError, match="scheduler's callable must return a torch scheduler"):
            run(scheduler=lambda o: o, steps=2)
        options = {"validation_data": X, "validate_every": 5, "optimizer": sgd(1e-6)}
        assert run(scheduler=reduce, steps=20, **options).history["lr"][-1] < 2e-7


class TestValidation:
    def test_bound(self) -> None:
        """In nats for all rows: the closed form, in one part and in several of unequal size."""
        new = randn(7, seed=5).double()
        exact = float(
            dist.Normal(0.3, 1.0).log_prob(new).sum()
            + dist.Normal(0.0, 2.0).log_prob(torch.tensor(0.3))
        )
        for batch_size in (None, 3):
            options = {"guide": point, "optimizer": sgd(0.0), "steps": 2, "objective": pvi.ELBO()}
            fit = run(**options, batch_size=batch_size, validation_data=new, validate_every=1)
            entropy = float(dist.Normal(0.3, 1e-30).log_prob(torch.tensor(0.3)))
            assert fit.history["validation_bound"] == pytest.approx(exact - entropy, abs=1e-6)

    def test_scaled_local_latents(self) -> None:
        """An amortised guide: the mean over parts is the whole."""
        model, guide, x = autoencoder(torch.float64)
        options = {"model": model, "guide": guide, "data": x, "optimizer": sgd(0.0), "steps": 1}
        new = randn(400, 6, seed=7)
        bounds = [
            run(**options, batch_size=size, validation_data=new.double(), validate_every=1)
            for size in (None, 30)
        ]
        one, two = (fit.history["validation_bound"][0] for fit in bounds)
        assert one != two  # other draws
        assert two == pytest.approx(one, rel=0.02)

    def test_leaves_the_fit_alone(self) -> None:
        """Its draws are not the fit's, and it runs in evaluation mode."""
        plain = run(steps=60, batch_size=6)
        checked = run(steps=60, batch_size=6, validation_data=X[:9], validate_every=7)
        assert all(torch.equal(x, values(checked)[name]) for name, x in values(plain).items())
        known = ~torch.isnan(torch.tensor(checked.history["validation_bound"]))
        assert known.nonzero().flatten().tolist() == [*range(6, 60, 7), 59]

    def test_patience(self) -> None:
        """Overfitting: training ends, with the parameters and buffers of the best step."""
        model, guide, x = autoencoder(torch.float64)
        torch.manual_seed(0)
        train, held = x[:12] + 0.5 * torch.randn(12, 6), x[12:] + 0.5 * torch.randn(48, 6)
        seen: dict[int, dict[str, Tensor]] = {}

        def keep(step: Any) -> None:
            if step.validation_bound is not None:
                tensors = step.params.tensors()
                seen[step.step] = {k: v.detach().clone() for k, v in tensors.items()}

        options = {"validation_data": held, "validate_every": 20, "patience": 4, "lr": 0.02}
        fit = run(model=model, guide=guide, data=train, steps=3000, callbacks=[keep], **options)
        bounds = fit.history["validation_bound"]
        best = 1 + int(torch.tensor(bounds).nan_to_num(-math.inf).argmax())
        assert len(fit.history) == best + 4 * 20 < 3000
        assert f"validation bound of step {best}" in fit.reason
        assert not fit.converged and "stopped early" in repr(fit)
        assert all(torch.equal(x, seen[best][name]) for name, x in values(fit).items())

    def test_best_at_the_end(self) -> None:
        """With patience the best parameters come back also where the steps just ended."""
        fit = run(
            steps=200, optimizer=sgd(1e-2), validation_data=X, validate_every=10, patience=1000
        )
        assert fit.notes and "where the validation bound was best" in fit.notes[-1]

    def test_rows_of_the_guide(self) -> None:
        """Parameters for each training row say nothing of others, also not of as many others."""
        for rows in (len(X), 9):
            with pytest.raises(GuideError, match=r"validation_data: .*Amortized"):
                run(model=local_model, validation_data=X[:rows], steps=2)

    def test_refused(self) -> None:
        for options, message in (
            ({"patience": 3}, "patience= is about the validation bound"),
            ({"validate_every": 3}, "give validation_data="),
            ({"patience": 0, "validation_data": X}, "patience must be a whole number"),
        ):
            with pytest.raises(FitError, match=message):
                run(steps=2, **options)
        bad = X.clone()
        bad[3] = torch.nan
        with pytest.raises(DataError, match="validation_data: observed site"):
            run(steps=2, validation_data=bad)


class TestCallbacks:
    def test_reason(self) -> None:
        fit = run(steps=9, callbacks=[lambda step: "enough" if step.step == 4 else None])
        assert (len(fit.history), fit.reason) == (4, "stopped by a callback: enough")

    def test_on_end(self) -> None:
        class Watch:
            fits: list[pvi.Fit] = []  # noqa: RUF012

            def __call__(self, step: Any) -> None:
                self.last = step

            def on_end(self, fit: pvi.Fit) -> None:
                self.fits.append(fit)

        watch = Watch()
        fit = run(steps=9, callbacks=[watch])
        assert watch.fits == [fit]
        assert watch.last.bound == fit.history["bound"][-1]
        assert watch.last.validation_bound is None
        assert watch.last.lr == fit.history["lr"][-1]


def test_a_look_ahead_may_leave_the_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far along the way the scale is negative; the fit itself was sound and is kept."""
    monkeypatch.setattr(drift, "FURTHER", (1e6,))

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 10.0), obs=torch.tensor(0.0))

    def guide() -> None:
        scale = pyro.param("scale", torch.tensor(1.5))
        pyro.sample("z", dist.Normal(0.0, scale))

    fit = pvi.fit(model, guide, optimizer="adam", lr=0.05, steps=400, seed=0, progress=False)
    assert len(fit.history) == 400
    assert float(fit.posterior.params.named()["scale"].detach()) == pytest.approx(0.995, abs=0.1)
