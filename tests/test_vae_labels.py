"""Autoencoders with conditions and labels: the bounds by hand, and what is refused."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal, kl_divergence
from torch.nn.functional import one_hot

import pvi
from pvi.errors import DataError
from pvi.models.vae import ConditionalVAE, Gaussian, SemiSupervisedVAE

pytestmark = pytest.mark.usefixtures("isolated")
DIM, CLASSES, LATENTS = 5, 3, 2


def made(kind: type, *args: int, **options: object):
    torch.manual_seed(0)
    return kind(DIM, *args, latents=LATENTS, likelihood=Gaussian(0.7), hidden=(8,), **options)


def data(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, DIM, generator=generator), torch.arange(n) % CLASSES


def bound(model, *rows: Tensor, calls: int = 40) -> Tensor:
    """Mean of the ELBO of 100 draws a call, and its standard error."""
    torch.manual_seed(2)
    objective = pvi.TraceMeanFieldELBO(num_particles=100)
    found = torch.tensor([objective.bound(model.model, model.guide, *rows) for _ in range(calls)])
    return torch.stack([found.mean(), found.std() / math.sqrt(calls)])


def by_hand(model, x: Tensor, c: Tensor, prior, draws: int = 4000) -> Tensor:
    """Bound of each row given one-hot conditions, and its standard error, `(2, N)`."""
    torch.manual_seed(3)
    q = model.encoded(x, c)
    z = q.sample((draws,))
    values = model.decoded(z, c.expand(draws, *c.shape)).log_prob(x) - kl_divergence(q, prior)
    return torch.stack([values.mean(0), values.std(0) / math.sqrt(draws)])


def agree(a: Tensor, b: Tensor) -> None:
    """Within four standard errors of the difference."""
    assert abs(a[0] - b[0]) < 4 * (a[1] ** 2 + b[1] ** 2).sqrt(), (a, b)


def total(parts: Tensor) -> Tensor:
    return torch.stack([parts[0].sum(), parts[1].square().sum().sqrt()])


@torch.no_grad()
@pytest.mark.parametrize("learned", [False, True])
def test_conditional_bound(learned: bool) -> None:
    model = made(ConditionalVAE, CLASSES, learned_prior=learned)
    x, y = data()
    c = one_hot(y, CLASSES).to(x)
    agree(bound(model, *model.rows(x, y)), total(by_hand(model, x, c, model.prior(c))))


class TestSemiSupervised:
    @staticmethod
    def each(model, x: Tensor) -> Tensor:
        """Mean and standard error of L(x, y), `(2, CLASSES, N)`."""
        prior = torch.distributions.Independent(
            torch.distributions.Normal(torch.zeros(len(x), LATENTS), 1.0), 1
        )
        found = []
        for label in range(CLASSES):
            c = one_hot(torch.full((len(x),), label), CLASSES).to(x)
            parts = by_hand(model, x, c, prior)
            found.append(torch.stack([parts[0] - math.log(CLASSES), parts[1]]))
        return torch.stack(found, 1)

    @torch.no_grad()
    def test_known_labels(self) -> None:
        model = made(SemiSupervisedVAE, CLASSES)
        x, y = data()
        each = self.each(model, x)
        want = each[:, y, torch.arange(len(x))]
        agree(bound(model, *model.rows(x, y)), total(want))

    @torch.no_grad()
    def test_unknown_labels_are_summed_out(self) -> None:
        model = made(SemiSupervisedVAE, CLASSES)
        x, _ = data()
        each, q = self.each(model, x), model.predict_proba(x).T
        mean = (q * each[0]).sum(0) + Categorical(q.T).entropy()
        se = (q * each[1]).square().sum(0).sqrt()
        agree(bound(model, *model.rows(x)), total(torch.stack([mean, se])))

    @torch.no_grad()
    def test_only_labelled_rows_have_a_penalty(self) -> None:
        model = made(SemiSupervisedVAE, CLASSES, alpha=3.0)
        x, y = data()
        y[::2] = -1
        terms = pvi.ELBO().terms(model.model, model.guide, *model.rows(x, y))
        log_q = model.predict_proba(x).log()
        want = -3.0 * torch.stack([log_q[i, y[i]] for i in range(1, len(x), 2)]).sum()
        torch.testing.assert_close(terms.penalty(), want.reshape(1))


def test_fit_learns_labels() -> None:
    """Two clusters, ten labels each."""
    torch.manual_seed(0)
    y = torch.arange(100) % 2
    x = torch.randn(100, DIM) * 0.3 + 2.0 * y[:, None]
    labels = torch.full((100,), -1)
    labels[:20] = y[:20]
    model = SemiSupervisedVAE(DIM, 2, latents=1, likelihood=Gaussian(0.3), hidden=(16,), alpha=30.0)
    model.fit(x, labels, epochs=60, batch_size=50, seed=0, progress=False)
    assert (model.predict(x) == y).float().mean() > 0.97
    assert model.encode(x).shape == (100, 1) and model.reconstruct(x[:3]).shape == (3, DIM)
    assert model.sample(4, seed=0).shape == model.sample(4, [0, 1, 1, 0]).shape == (4, DIM)


def test_vectors_as_conditions() -> None:
    model = made(ConditionalVAE, conditions=2)
    x, _ = data()
    c = torch.randn(len(x), 2)
    model.fit(x, c, epochs=2, batch_size=3, seed=0, progress=False)
    assert model.sample(3, c[:3]).shape == (3, DIM)
    assert model.encode(x, c).shape == (len(x), LATENTS)
    assert model.score_samples(x, c, num_samples=10, seed=0).log_evidence.shape == (len(x),)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "needs y"),
        (torch.zeros(5), r"shape \(6,\)"),
        (torch.full((6,), 3), "from 0 to 2"),
        (torch.full((6,), 0.5), "from 0 to 2"),
    ],
)
def test_wrong_conditions(y: Tensor | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(ConditionalVAE, CLASSES).fit(data()[0], y)


@pytest.mark.parametrize("y", [torch.zeros(5), torch.full((6,), 3), torch.full((6,), -2)])
def test_wrong_labels(y: Tensor) -> None:
    with pytest.raises(DataError, match="6 labels from 0 to 2"):
        made(SemiSupervisedVAE, CLASSES).fit(data()[0], y)


class Linear(torch.nn.Module):
    """A decoder W z + V c + b."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.c = torch.nn.Linear(LATENTS, DIM), torch.nn.Linear(CLASSES, DIM)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return self.z(z) + self.c(c)

    def exact(self, x: Tensor, c: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
        """Log density of x where z is normal and the noise has sd 0.7."""
        w = self.z.weight
        noise = 0.7**2 * torch.eye(DIM)
        cov = w @ sd.square().diag_embed() @ w.T + noise
        return MultivariateNormal(self(mean, c), cov).log_prob(x)


@torch.no_grad()
@pytest.mark.parametrize("learned", [False, True])
def test_evidence_of_linear_decoders_with_conditions(learned: bool) -> None:
    decoder = Linear()
    model = made(ConditionalVAE, CLASSES, decoder=decoder, learned_prior=learned)
    x, y = data()
    c = one_hot(y, CLASSES).to(x)
    prior = model.prior(c)
    truth = decoder.exact(x, c, prior.mean, prior.stddev)
    found = model.score_samples(x, y, num_samples=3000, seed=0)
    assert ((found.log_evidence - truth).abs() < 4.5 * found.se).all() and found.se.max() < 0.1


@torch.no_grad()
def test_evidence_of_linear_decoders_with_labels() -> None:
    """log p(x) where the label is unknown, log p(x, y) where it is known."""
    decoder = Linear()
    model, (x, y) = made(SemiSupervisedVAE, CLASSES, decoder=decoder), data()
    start = torch.zeros(LATENTS), torch.ones(LATENTS)
    each = torch.stack([decoder.exact(x, c, *start) for c in torch.eye(CLASSES)]) - math.log(3)
    labels = torch.where(torch.arange(len(x)) < 3, y, -1)
    truth = torch.where(labels < 0, each.logsumexp(0), each[y, torch.arange(len(x))])
    found = model.score_samples(x, labels, num_samples=3000, seed=0)
    assert ((found.log_evidence - truth).abs() < 4.5 * found.se).all() and found.se.max() < 0.1
