"""Parts of topic models against formulas and numbers computed by hand."""

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import pvi
from pvi.models.topics.assembly import FAMILIES
from pvi.models.topics.coordinate import CoordinateAscent
from pvi.models.topics.counts import Bag, Counts
from pvi.models.topics.decoders import Mixture, Product, Sparse
from pvi.models.topics.embedded import Clustered, Dynamic, Embedded
from pvi.models.topics.encoders import Encoder
from pvi.models.topics.families import Correlated, Dirichlet, LaplaceDirichlet, LogisticNormal
from pvi.models.topics.gammas import WeibullDraws
from pvi.models.topics.heads import Labels
from pvi.models.topics.inference import Inference, evaluating
from pvi.models.topics.likelihoods import MixtureWords, Words
from pvi.models.topics.normalization import BatchNorm
from pvi.models.topics.positions import word_positions
from pvi.models.topics.programs import TopicPrograms
from pvi.models.topics.random_walk import RandomWalk
from pvi.models.topics.seeding import document_topics, maximised
from pvi.models.topics.transport import transport_cost
from pvi.models.topics.weights import NormalWeights, SparseWeights, WalkWeights

K, V = 3, 7


def corpus(rows: int = 12, empty: bool = True) -> Any:
    counts = np.random.default_rng(0).poisson(0.7, (rows, V))
    counts[1] = 0 if empty else counts[1]
    return csr_matrix(counts.astype(float))


def batch_of(matrix: Any, **columns: Tensor) -> dict[str, Tensor]:
    return Counts(matrix, columns).batch(np.arange(matrix.shape[0]))


def programs(decoder: Any = None, family: Any = None, **options: Any) -> TopicPrograms:
    torch.manual_seed(0)
    family = family or LogisticNormal(K)
    encoder = Encoder(V, family.width, hidden=(8,), normalize=False)
    return TopicPrograms(family, encoder, decoder or Mixture(K, V), **options)


def test_batches_hold_the_rows_of_the_matrix() -> None:
    matrix = corpus()
    data = Counts(matrix, {"labels": torch.arange(12)})
    batch = data.batch(np.array([5, 1, 3]))
    bag = Bag.of(batch["words"], batch["counts"])
    assert np.array_equal(bag.dense(V).numpy(), matrix[[5, 1, 3]].toarray())
    assert bag.filled.tolist() == [True, False, True]
    assert batch["labels"].tolist() == [5, 1, 3]
    assert torch.equal(bag.summed(bag.counts), batch["counts"].sum(1))
    items = data.__getitems__([5, 1, 3])
    assert all(len(item["words"]) == data.width for item in items)
    assert torch.equal(
        torch.stack([i["counts"] for i in items])[:, : len(batch["words"][0])].sum(1),
        batch["counts"].sum(1),
    )


def test_likelihoods_are_sums_of_log_probabilities() -> None:
    """$\\sum_w n_w \\log p_w$ by hand, and a multinomial's without its coefficient."""
    matrix = corpus()
    batch = batch_of(matrix)
    bag = Bag.of(batch["words"], batch["counts"])
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(12, K, generator=generator)
    shares = shares / shares.sum(1, keepdim=True)
    topics = torch.rand(K, V, generator=generator).softmax(-1)
    x = torch.as_tensor(matrix.toarray(), dtype=torch.float32)
    by_hand = (x * (shares @ topics).log()).sum(1)
    mixture = MixtureWords(shares, topics, bag, batch["counts"].shape[1])
    assert torch.allclose(mixture.log_prob(batch["counts"]), by_hand, atol=1e-5)
    dense = Words((shares @ topics).log() + 3.0)  # logits may have any constant
    assert torch.allclose(dense.log_prob(x), by_hand, atol=1e-5)
    multinomial = torch.stack(
        [
            torch.distributions.Multinomial(int(row.sum()), probs=p).log_prob(row)
            for row, p in zip(x, shares @ topics, strict=True)
        ]
    )
    orders = torch.lgamma(x.sum(1) + 1) - torch.lgamma(x + 1).sum(1)
    assert torch.allclose(by_hand, multinomial - orders, atol=1e-4)
    assert mixture.log_prob(batch["counts"])[1] == 0.0  # no words


def test_topics_of_times_are_looked_up_by_time() -> None:
    batch = batch_of(corpus())
    bag = Bag.of(batch["words"], batch["counts"])
    topics, shares = torch.rand(4, K, V).softmax(-1), torch.rand(12, K).softmax(-1)
    times = torch.arange(12) % 4
    found = MixtureWords(shares, topics, bag, batch["counts"].shape[1], times)
    by_hand = torch.einsum("bk,bkv->bv", shares, topics[times]).log()
    want = (bag.dense(V) * by_hand).sum(1)
    assert torch.allclose(found.log_prob(batch["counts"]), want, atol=1e-5)


def test_laplace_approximation_is_the_papers() -> None:
    """Against eq. 3 of Srivastava and Sutton (2017), term by term."""
    alpha = torch.full((K,), 0.3)
    variance = 1 / alpha * (1 - 2 / K) + (1 / alpha).sum() / K**2
    loc, scale = LaplaceDirichlet(K, 0.3).location()
    assert torch.equal(loc, alpha.log() - alpha.log().mean())
    assert torch.allclose(scale.square(), variance)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Shares sum to 1, KLs are exact, and means are those of draws."""
    family = FAMILIES[name](K)
    torch.manual_seed(0)
    q = family.posterior(torch.randn(4, family.width))
    draws = family.shares(q.sample((20_000,)))
    assert torch.allclose(draws.sum(-1), torch.ones(20_000, 4), atol=1e-5)
    p = family.prior().expand((4,))
    assert kl_divergence(q, p).shape == (4,)
    found = family.mean(q, Inference(programs(family=FAMILIES[name](K))).noise)
    se = draws.std(0) / 20_000**0.5
    near = 1e-4 if name in ("gamma", "dirichlet") else 0.01  # in closed form, or by 64 points
    assert ((found - draws.mean(0)).abs() < 5 * se + near).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_divergences_are_means_of_log_ratios(name: str) -> None:
    family = FAMILIES[name](K)
    torch.manual_seed(1)
    q = family.posterior(1.0 + 0.3 * torch.randn(3, family.width))
    p = family.prior().expand((3,))
    z = q.sample((40_000,))
    ratios = q.log_prob(z) - p.log_prob(z)
    se = ratios.std(0) / 200
    assert ((kl_divergence(q, p) - ratios.mean(0)).abs() < 5 * se).all()


def test_weibull_is_a_gamma_where_it_is_an_exponential() -> None:
    exponential = WeibullDraws(torch.tensor([0.5]), torch.tensor([1.0]))
    gamma = dist.Gamma(torch.tensor([1.0]), torch.tensor([2.0]))
    assert abs(float(kl_divergence(exponential, gamma))) < 1e-6


def test_random_walk_is_the_normal_of_its_sums() -> None:
    """Density and divergence against a multivariate normal over the times."""
    times, spread, step = 4, 1.5, 0.3
    walk = RandomWalk(torch.zeros(times, 2), spread, step)
    sums = torch.ones(times, times).tril()
    factor = sums * torch.tensor([spread, step, step, step])
    dense = MultivariateNormal(torch.zeros(times), scale_tril=factor)
    torch.manual_seed(0)
    x = walk.rsample((5,))
    assert torch.allclose(walk.log_prob(x), dense.log_prob(x.movedim(-1, 0)).sum(0), atol=1e-3)
    loc, scale = torch.randn(times, 2), torch.rand(times, 2) + 0.1
    q = dist.Normal(loc, scale).to_event(2)
    want = sum(
        kl_divergence(MultivariateNormal(loc[:, i], torch.diag(scale[:, i] ** 2)), dense)
        for i in range(2)
    )
    assert torch.allclose(kl_divergence(q, walk), torch.as_tensor(want), rtol=1e-4)


def test_walks_vary_as_they_should() -> None:
    torch.manual_seed(0)
    x = RandomWalk(torch.zeros(3, 1), 2.0, 0.5).rsample((20_000,)).squeeze(-1)
    want = torch.tensor([4.0, 4.25, 4.5])
    assert ((x.var(0) - want).abs() < 5 * want * (2 / 20_000) ** 0.5).all()


@pytest.mark.parametrize(
    "weights", [NormalWeights((2, 3)), SparseWeights((2, 3)), WalkWeights((2, 3))]
)
def test_latent_weights_have_exact_divergences(weights: Any) -> None:
    assert kl_divergence(weights.posterior(), weights.prior()).shape == ()


def test_correlated_shares_have_the_covariance_of_their_factor() -> None:
    torch.manual_seed(0)
    family = Correlated(K)
    with torch.no_grad():
        family.raw_correlation.copy_(torch.tensor([1.0, -0.5, 0.3]))
        family.raw_scale.copy_(torch.tensor([0.1, 1.0, 2.0]))
    z = dist.Normal(0.0, 1.0).expand([50_000, K]).sample()
    logits = family.shares(z).log()
    logits = (logits - logits[:, :1])[:, 1:]
    contrast = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    factor = family.factor().detach()
    want = contrast @ factor @ factor.T @ contrast.T
    assert torch.allclose(torch.cov(logits.T), want, rtol=0.05, atol=0.02)
    assert torch.allclose(family.correlation().diagonal(), torch.ones(K), atol=1e-5)


def test_covariates_shift_correlated_means() -> None:
    """The shift is that of the logits, whatever the factor."""
    family = Correlated(K)
    with torch.no_grad():
        family.raw_correlation.copy_(torch.tensor([1.0, -0.5, 0.3]))
    shift = torch.tensor([[0.0, 1.0, -2.0]])
    at_mean = family.shares(family.prior(shift).base_dist.loc)
    assert torch.allclose(at_mean, shift.softmax(-1), atol=1e-5)


def test_coordinate_ascent_is_scikit_learns_local_step() -> None:
    """The fixed point of `LatentDirichletAllocation`, whose topics are $e^{E \\log \\beta}$."""
    from sklearn.decomposition import LatentDirichletAllocation

    matrix = corpus(40, empty=False)
    alpha = 0.4
    peer = LatentDirichletAllocation(
        K,
        doc_topic_prior=alpha,
        max_iter=3,
        random_state=0,
        max_doc_update_iter=2000,
        mean_change_tol=1e-9,
    ).fit(matrix)
    batch = batch_of(matrix)
    bag = Bag.of(batch["words"], batch["counts"])
    rows = torch.as_tensor(peer.exp_dirichlet_component_.T)[bag.words]
    gamma = CoordinateAscent(K, alpha, steps=2000)(bag, rows)
    shares = (gamma / gamma.sum(1, keepdim=True)).numpy()
    assert np.abs(shares - peer.transform(matrix)).max() < 1e-3


def test_the_cost_of_a_transport_is_that_of_the_best_assignment() -> None:
    from scipy.optimize import linear_sum_assignment

    cost = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    best = cost.numpy()[linear_sum_assignment(cost.numpy())].sum() / 6
    found = transport_cost(cost, precision=300.0, iterations=500)
    assert abs(float(found) - best) < 5e-3


def test_batches_are_normalised_in_steps_only() -> None:
    norm = BatchNorm(2, momentum=0.5)
    x = torch.tensor([[0.0, 1.0], [2.0, 5.0]], requires_grad=True)
    assert torch.allclose(norm(x).detach(), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-3)
    assert norm.mean.tolist() == [0.5, 1.5]
    for quiet in (norm.eval(), norm.train()):
        with torch.no_grad():
            one, both = quiet(x[:1]), quiet(x)
        assert torch.equal(one, both[:1])
    assert norm.mean.tolist() == [0.5, 1.5]


DECODERS = {
    "mixture": lambda: Mixture(K, V),
    "product": lambda: Product(K, V, dropout=0.5),
    "sage": lambda: Sparse(K, V),
    "etm": lambda: Embedded(K, V, 4),
    "ecrtm": lambda: Clustered(K, V, 12, 4),
    "dynamic": lambda: Dynamic(K, V, 2, 4),
}


@pytest.mark.parametrize("bayesian", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_particles_of_all_decoders(name: str, bayesian: bool) -> None:
    """Batched particles give the objective that a loop over them gives, with exact KLs."""
    more = {"times": torch.arange(12) % 2} if name == "dynamic" else {}
    times = 2 if more else 0
    torch.manual_seed(0)
    family = LogisticNormal(K)
    encoder = Encoder(V, family.width, covariates=times, hidden=(8,), normalize=False)
    made = TopicPrograms(family, encoder, DECODERS[name](), times=times, bayesian=bayesian)
    batch = batch_of(corpus(), **more)
    objective = pvi.TraceMeanFieldELBO(2)
    said = str(objective.explain(made.model, made.guide, **batch))
    assert "Monte Carlo" not in said
    made.eval()
    with torch.no_grad():
        torch.manual_seed(0)
        count = 5 if name == "ecrtm" else 30  # its penalty takes most of the time
        batched = [loss_of(made, batch, count) for _ in range(3)]
        single = [loss_of(made, batch, 1) for _ in range(20)]
    se = np.std(single) * (1 / 20 + 1 / (3 * count)) ** 0.5
    assert abs(np.mean(batched) - np.mean(single)) < 5 * se + 1e-3


def loss_of(made: TopicPrograms, batch: Any, particles: int) -> float:
    return float(pvi.TraceMeanFieldELBO(particles)(made.model, made.guide)(**batch))


@pytest.mark.parametrize("name", DECODERS)
def test_components_are_distributions(name: str) -> None:
    decoder = DECODERS[name]()
    rows = decoder.components(decoder.weights)
    assert rows.shape == (K, V)
    assert torch.allclose(rows.sum(1), torch.ones(K), atol=1e-5)


def test_the_bound_with_labels_by_hand() -> None:
    """$\\sum_d E_q[\\log p(x_d) + \\log p(y_d)] - KL_d$: each label weighs as its document does."""
    labels = torch.tensor([0, 1, -1, 2] * 3)
    made = programs(heads=[Labels(K, 3)]).eval()
    batch = batch_of(corpus(), labels=labels)
    bag = Bag.of(batch["words"], batch["counts"])
    with torch.no_grad():
        torch.manual_seed(3)
        value = -float(pvi.TraceMeanFieldELBO()(made.model, made.guide)(**batch))
        q = made.posterior(bag, batch)
        torch.manual_seed(3)
        z = q.rsample()
        shares = z.softmax(-1)
        topics: Any = made.decoder.weights.softmax(-1)
        words = (bag.dense(V) * (shares @ topics).log()).sum(1)
        head: Any = made.heads[0]
        log_p = head.linear(shares).log_softmax(-1)
        told = log_p.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        told = told * ((labels >= 0) & bag.filled)
        divergence = kl_divergence(q, made.family.prior()) * bag.filled
    prior = 0.1 * topics.log().sum()  # of topics, a Dirichlet in the coordinates of the softmax
    by_hand = float((words + told - divergence).sum() + prior)
    assert abs(value - by_hand) < 1e-4 * abs(by_hand)
    assert abs(float(told.sum())) > 5.0  # labels do weigh


def test_empty_documents_add_nothing() -> None:
    made = programs().eval()
    one, two = corpus(), corpus()[[i for i in range(12) if i != 1]]
    inference = Inference(made)
    assert inference.bound(batch_of(one), 3)[1] == 0.0
    torch.manual_seed(0)
    kl = pvi.TraceMeanFieldELBO().evaluate(made.model, made.guide, (), batch_of(one)).stacked()
    torch.manual_seed(0)
    fewer = pvi.TraceMeanFieldELBO().evaluate(made.model, made.guide, (), batch_of(two)).stacked()
    names, place = kl[0], kl[0].index("kl/z")
    assert names == fewer[0]
    assert torch.allclose(kl[1][place], fewer[1][place], rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_minibatches_average_to_the_whole(name: str) -> None:
    """Bound and gradients over a partition, at the same latents; normalisation is off its batch."""
    from pyro import poutine

    size, parts = 12, 3
    more = {"times": torch.arange(size) % 2} if name == "dynamic" else {}
    times = 2 if more else 0
    torch.manual_seed(0)
    family = LogisticNormal(K)
    encoder = Encoder(V, family.width, covariates=times, hidden=(8,), normalize=False)
    made = TopicPrograms(family, encoder, DECODERS[name](), times=times).eval()
    data = Counts(corpus(), more)
    z = torch.randn(size, K)

    def value(rows: np.ndarray) -> Tensor:
        given = {"z": z[torch.as_tensor(rows)]}
        if made.bayesian:
            given |= {"topics": made.point().detach(), "trend": torch.zeros(2, K)}
        trace = poutine.trace(poutine.condition(made.model, given)).get_trace(**data.batch(rows))
        trace.compute_log_prob()
        local = sum(trace.nodes[n]["log_prob_sum"] for n in ("z", "words"))
        return local * (size / len(rows))

    def gradient(rows: np.ndarray) -> Tensor:
        wanted = [p for p in made.decoder.parameters() if p.requires_grad]
        found = torch.autograd.grad(value(rows), wanted, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    whole, split = np.arange(size), np.split(np.arange(size), parts)
    assert torch.allclose(value(whole), sum(map(value, split)) / parts, rtol=1e-5)
    if any(p.requires_grad for p in made.decoder.parameters()):
        mean = sum(map(gradient, split)) / parts
        assert torch.allclose(gradient(whole), mean, rtol=1e-3, atol=1e-4)
        assert float(mean.abs().max()) > 0.1


def test_scores_are_the_mean_of_objectives() -> None:
    """The bound of `Inference` is that of `pvi.ELBO`, in evaluation mode, within its error."""
    made = programs(Product(K, V, dropout=0.5))
    batch = batch_of(corpus())
    found = Inference(made).bound(batch, 100)
    with evaluating(made):
        torch.manual_seed(0)
        values = [-loss_of(made, batch, 1) for _ in range(40)]
    se = np.std(values) * (1 / 40 + 1 / 100) ** 0.5
    assert abs(float(found.sum()) - np.mean(values)) < 5 * se
    assert made.training  # as it was


def test_evidence_is_above_the_bound_and_exact_for_no_latents() -> None:
    made = programs(family=LogisticNormal(K, scale=1e-3))
    with torch.no_grad():  # a posterior that is the prior: both are log p(x) at equal shares
        made.encoder.last.weight.zero_()
        made.encoder.last.bias.copy_(
            torch.cat([torch.zeros(K), torch.full((K,), math.log(math.expm1(9e-4)))])
        )
    batch = batch_of(corpus())
    inference, weights = Inference(made), made.point().detach()
    flat = inference.log_likelihood(torch.full((12, K), 1 / K), batch)
    assert torch.allclose(inference.log_evidence(batch, weights, 50, 0), flat, atol=0.01)
    assert torch.allclose(inference.bound(batch, 50), flat, atol=0.05)


def test_topics_begin_at_unlike_documents() -> None:
    """Groups of documents without a common word are each some topic's beginning."""
    block = np.kron(np.eye(3), np.ones((30, 4)))
    torch.manual_seed(0)
    start = document_topics(csr_matrix(block), 3)
    assert sorted(start.argmax(1).div(4, rounding_mode="floor").tolist()) == [0, 1, 2]
    assert torch.allclose(start.sum(1), torch.ones(3))


def test_maximisation_finds_topics_that_explain_documents() -> None:
    """Of documents of one topic each, which share no word: their words, and the prior's 0.1."""
    block = np.kron(np.eye(3), np.ones((30, 4)))
    truth = torch.as_tensor(np.kron(np.eye(3), np.ones((1, 4)))).float()
    weak = 0.5 * truth / 4 + 0.5 / 12
    torch.manual_seed(0)
    found = maximised(csr_matrix(block), weak)
    assert torch.allclose(found, (30 * truth + 0.1) / (120 + 1.2), atol=0.01)
    assert torch.allclose(maximised(csr_matrix((2, 12)), weak), torch.tensor(1 / 12))


def test_dirichlet_posteriors_have_the_gradient_of_their_divergence() -> None:
    family = Dirichlet(K, 0.5)
    h = torch.zeros(1, K, requires_grad=True)
    kl_divergence(family.posterior(h), family.prior()).sum().backward()
    step = 1e-2
    moved = [
        float(kl_divergence(family.posterior(torch.tensor([[s, 0.0, 0.0]])), family.prior()))
        for s in (-step, step)
    ]
    assert h.grad is not None
    assert abs(float(h.grad[0, 0]) - (moved[1] - moved[0]) / (2 * step)) < 1e-3


def test_words_of_like_documents_begin_close_together() -> None:
    """Words that always occur together at one place; those that never occur stay where they are."""
    block = np.hstack([np.kron(np.eye(3), np.ones((10, 4))), np.zeros((30, 1))])
    start = torch.full((13, 4), 9.0)
    found = word_positions(csr_matrix(block), start)
    cosines = found[:12] @ found[:12].T
    assert torch.allclose(cosines, torch.kron(torch.eye(3), torch.ones(4, 4)), atol=1e-4)
    assert torch.equal(found[12], start[12])
    assert torch.equal(word_positions(csr_matrix((3, 13)), start), start)
