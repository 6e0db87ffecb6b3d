"""What every model of the family has to do: in any precision, row by row, with particles, saved."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import pvi
from pvi.errors import CheckpointError, DataError, ModelError
from pvi.models.vae import (
    GAN,
    VAE,
    VQVAE,
    AutoregressiveLikelihood,
    AutoregressiveModel,
    Categorical,
    ConditionalVAE,
    ContinuousBernoulli,
    DiffusionVAE,
    DiscretizedLogistic,
    ExactModel,
    FactorVAE,
    FlowModel,
    Gaussian,
    HierarchicalVAE,
    KLAutoencoder,
    LadderVAE,
    Laplace,
    NoiseSchedule,
    Poisson,
    SemiSupervisedVAE,
    ZeroInflatedNegativeBinomial,
)
from pvi.models.vae.counts import DiscretizedLogisticDistribution
from pvi.nn import MLP, ConvDecoder, ConvEncoder, DenoisingMLP, PixelCNN
from tests.scenarios import EXACT, isolated, randn

N, DIM, CLASSES = 6, 5, 3
REAL, IMAGES = randn(N, DIM), (randn(N, 1, 5, 3) > 0).float()
BITS, LABELS = (REAL > 0).float(), torch.arange(N) % CLASSES
FLOW: dict[str, Any] = {"options": {"hidden_features": (4,), "transforms": 1}}


def parts(**others: Any) -> dict[str, Any]:
    """Networks of four units, and a likelihood of one's own for each model."""
    return {"hidden": (4,), "likelihood": Gaussian(), **others}


def convolutional() -> VAE:
    networks = ConvEncoder((1, 5, 3), 4, (4,)), ConvDecoder(2, (1, 5, 3), (4,))
    return VAE((1, 5, 3), 2, encoder=networks[0], decoder=networks[1])


def latent_diffusion() -> DiffusionVAE:
    network = DenoisingMLP(2, 8, 1)
    return DiffusionVAE(DIM, 3, network=network, autoencoder=VAE(DIM, 2, **parts()))


MODELS: dict[str, tuple[Callable[[], Any], tuple[Tensor, ...]]] = {
    "vae": (lambda: VAE(DIM, 2, **parts()), (REAL,)),
    "convolutional": (convolutional, (IMAGES,)),
    "classes": (lambda: VAE(DIM, 2, **parts(likelihood=Categorical(3))), (BITS,)),
    "counts": (
        lambda: VAE(DIM, 2, **parts(likelihood=ZeroInflatedNegativeBinomial(DIM))),
        (BITS,),
    ),
    "written": (
        lambda: VAE(DIM, 2, **parts(likelihood=AutoregressiveLikelihood(DIM, Gaussian()))),
        (REAL,),
    ),
    "conditional": (lambda: ConditionalVAE(DIM, CLASSES, latents=2, **parts()), (REAL, LABELS)),
    "semi-supervised": (
        lambda: SemiSupervisedVAE(DIM, CLASSES, latents=2, **parts()),
        (REAL, torch.tensor([-1, 0, 1, 2, -1, -1])),
    ),
    "ladder": (lambda: LadderVAE(DIM, (3, 2), features=4, **parts()), (REAL,)),
    "bottom-up": (lambda: HierarchicalVAE(DIM, (3, 2), **parts()), (REAL,)),
    "vq": (lambda: VQVAE((1, 5, 3), 4, 2, channels=(4, 4)), (IMAGES,)),
    "diffusion": (lambda: DiffusionVAE(DIM, 3, network=DenoisingMLP(DIM, 8, 1)), (BITS,)),
    "diffusion of classes": (
        lambda: DiffusionVAE(DIM, 3, likelihood=Categorical(3), decoder=MLP((DIM, 3), 15, (4,))),
        (BITS,),
    ),
    "latent diffusion": (latent_diffusion, (REAL,)),
    "autoregressive": (lambda: AutoregressiveModel(DIM, likelihood=Gaussian()), (REAL,)),
    "pixels": (
        lambda: AutoregressiveModel((1, 5, 3), network=PixelCNN((1, 5, 3), 1, 4, 2)),
        (IMAGES,),
    ),
    "flow": (lambda: FlowModel(DIM, **FLOW), (REAL,)),
    "flow of levels": (lambda: FlowModel(DIM, **FLOW, levels=2), (BITS,)),
    "factor": (lambda: FactorVAE(DIM, 2, discriminator=MLP(2, 1, (4,)), **parts()), (REAL,)),
    "latent maps": (lambda: KLAutoencoder((1, 5, 3), 2, channels=(4, 4)), (IMAGES,)),
    "gan": (lambda: GAN(DIM, 2, hidden=(4,)), (REAL,)),
}
ONE_LEVEL = [name for name in MODELS if "diffusion" not in name]  # one step of noise a batch


def made(name: str) -> tuple[Any, tuple[Tensor, ...]]:
    """A model away from its start, and its data."""
    make, rows = MODELS[name]
    torch.manual_seed(0)
    model = make()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model, rows


def given(model: Any, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What `sample` of as many needs besides."""
    return tuple(y.clamp(min=0) for y in rows[1:])


def answers(model: Any, rows: tuple[Tensor, ...]) -> list[Tensor]:
    """All that a model says of data, as far as it has it: with one seed, always the same."""
    found = [model.sample(len(rows[0]), *given(model, rows), seed=1)]
    if not isinstance(model, ExactModel | GAN):
        z = model.encode(*rows)
        found += [z, model.decode(z, *given(model, rows)), model.reconstruct(*rows)]
        found += [model.decode(z.numpy(), *(y.numpy() for y in given(model, rows)))]
    if not isinstance(model, GAN | VQVAE):
        found += [model.score_samples(*rows, num_samples=3, seed=2).log_evidence]
    return found


@pytest.mark.filterwarnings("ignore:latents 'z'. collapsed")  # after two steps
@pytest.mark.parametrize("name", MODELS)
def test_in_the_precision_of_the_parameters(name: str, tmp_path: Path) -> None:
    """A model in double precision where the default is single, and again from its folder."""
    with isolated(torch.float32):
        model, rows = made(name)
        model.double().fit(*rows, batch_size=3, steps=2, seed=0, progress=False, compile=False)
        found = answers(model, rows)
        assert all(x.isfinite().all() for x in found)
        assert {x.dtype for x in found if x.is_floating_point()} == {torch.float64}
        model.save(tmp_path / "model")
        again = answers(type(model).load(tmp_path / "model"), rows)
        assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("name", MODELS)
def test_one_row(name: str) -> None:
    with isolated():
        model, rows = made(name)
        one = tuple(x[:1] for x in rows)
        for objective in (pvi.ELBO(3), pvi.TraceMeanFieldELBO()):
            assert math.isfinite(objective.bound(model.model, model.guide, *model.rows(*one)))
        assert all(len(x) == 1 and x.isfinite().all() for x in answers(model, one))


def sites(trace: poutine.Trace) -> dict[str, Any]:
    """The sample sites of a run, but for those that tell of subsampling."""
    nodes = {k: v for k, v in trace.nodes.items() if v["type"] == "sample"}
    return {k: v for k, v in nodes.items() if type(v["fn"]).__name__ != "_Subsample"}


def run(program: Callable, rows: tuple[Tensor, ...], values: dict[str, Tensor]) -> dict[str, Any]:
    """The sites of a run where latents have these values, or the program's own."""
    held = poutine.condition(program, data=values) if values else program
    found = sites(poutine.trace(held).get_trace(*rows))
    for node in found.values():
        node["log_prob"] = node["fn"].log_prob(node["value"])
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_LEVEL)
def test_minibatches_add_up(name: str) -> None:
    """Site by site, the densities of a row do not depend on the rows around it."""
    with isolated():
        model, rows = made(name)
        whole = model.eval().double().rows(*rows)
        q = run(model.guide, whole, {})
        z = {site: node["value"] for site, node in q.items()}
        p = run(model.model, whole, z)
        for part in (slice(0, 2), slice(2, N)):
            some, at = tuple(x[part] for x in whole), {k: v[part] for k, v in z.items()}
            for program, all_of in ((model.guide, q), (model.model, p)):
                for site, node in run(program, some, at).items():
                    want = all_of[site]["log_prob"][part]
                    torch.testing.assert_close(node["log_prob"], want, rtol=EXACT, atol=EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_particles_are_batched_and_apart(name: str) -> None:
    """In one run for all particles, not in a loop; each is what a run of its own would be."""
    with isolated():
        model, rows = made(name)
        rows = model.eval().double().rows(*rows)
        assert "particles: batched" in str(pvi.ELBO(3).explain(model.model, model.guide, *rows))
        if name == "semi-supervised":  # sums over labels, which the plan compares run by run
            return
        plate = pyro.plate("particles", 3, dim=-2)
        q = run(plate(model.guide), rows, {})
        z = {site: node["value"] for site, node in q.items()}
        p = run(plate(model.model), rows, z)
        for k in range(3):
            own = {site: value[k].reshape(value.shape[1:]) for site, value in z.items()}
            own = {k: v[0] if k == "time" else v for k, v in own.items()}  # outside of the data
            for program, together in ((model.guide, q), (model.model, p)):
                for site, node in run(program, rows, own).items():
                    found = together[site]["log_prob"]
                    found = found.expand(3, *found.shape[1:])[k].reshape(node["log_prob"].shape)
                    torch.testing.assert_close(found, node["log_prob"], rtol=EXACT, atol=EXACT)
        for site, value in z.items():
            assert name == "vq" or not torch.equal(value[0], value[1]), site


def test_a_latent_diffusion_of_ones_own_networks_is_saved(tmp_path: Path) -> None:
    """Its autoencoder's likelihood and decoder are no arguments of its own."""
    own: Any = {"encoder": nn.Linear(DIM, 4), "decoder": nn.Linear(2, DIM)}
    vae = VAE(DIM, 2, likelihood=Gaussian(), **own)
    model = DiffusionVAE(DIM, 3, network=DenoisingMLP(2, 8, 1), autoencoder=vae)
    model.save(tmp_path / "model")
    new = {"encoder": nn.Linear(DIM, 4), "decoder": nn.Linear(2, DIM)}
    again = DiffusionVAE.load(tmp_path / "model", **new)
    assert torch.equal(again.sample(4, seed=0), model.sample(4, seed=0))
    assert again.likelihood is again.autoencoder.likelihood  # type: ignore[union-attr]
    assert model.get_params(deep=True)["likelihood"] is None
    with pytest.raises(CheckpointError, match="no argument encodr="):
        DiffusionVAE.load(tmp_path / "model", encodr=new["encoder"], **new)


def test_a_frozen_autoencoder_stays_in_evaluation_mode() -> None:
    """Else training would move the running means of its layers, and dropout would be on."""
    norm = nn.BatchNorm1d(DIM)
    vae = VAE(DIM, 2, likelihood=Gaussian(), encoder=nn.Sequential(norm, nn.Linear(DIM, 4)))
    model = DiffusionVAE(DIM, 3, network=DenoisingMLP(2, 8, 1), autoencoder=vae)
    model.fit(REAL, steps=2, seed=0, progress=False, compile=False)
    assert model.training and not norm.training and not vae.likelihood.training
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0


def test_modes_of_parts_are_put_back() -> None:
    model = VAE(DIM, 2, **parts())
    model.encoder.eval()
    model.encode(REAL)
    assert model.training and model.decoder.training and not model.encoder.training


def test_a_fit_trains() -> None:
    """A model in evaluation mode would keep its codebook, its optimal scale, and no dropout."""
    model = VAE(DIM, 2, likelihood=Gaussian("optimal"), hidden=(4,)).eval()
    model.fit(10.0 * REAL, steps=5, seed=0, progress=False, compile=False)
    assert float(model.likelihood.running) > 1.5  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_the_optimal_scale_of_diffusion(kind: type[Gaussian]) -> None:
    """It ends at that of z_0 around the data, by 0.05 of the way in each step."""
    torch.manual_seed(0)
    x, steps, size = randn(400, 2), 150, math.exp(-1.5)  # sigma / alpha of z_0
    model = DiffusionVAE(2, 2, network=DenoisingMLP(2, 8, 1), likelihood=kind("optimal"))
    model.schedule.low.data.fill_(-3.0)
    model.fit(x, steps=steps, lr=1e-9, batch_size=400, seed=0, progress=False, compile=False)
    best = size if kind is Gaussian else size * math.sqrt(2 / math.pi)
    se = best / math.sqrt(2 * 800 * 39)  # a mean over 800 numbers and 2 / 0.05 - 1 steps
    found = float(model.likelihood.running) - (1 - best) * 0.95**steps  # type: ignore[arg-type]
    assert abs(found - best) < 5 * se


@pytest.mark.parametrize("likelihood", [Poisson(), ContinuousBernoulli()])
def test_diffusion_has_no_rule_for_other_likelihoods(likelihood: Any) -> None:
    """The datum that fits z_0 best is neither the logit nor the softplus of a mean."""
    with pytest.raises(ModelError, match=f"{type(likelihood).__name__} needs decoder="):
        DiffusionVAE(DIM, 3, likelihood=likelihood)


@pytest.mark.parametrize(
    "likelihood", [Gaussian(0.1), Gaussian("decoded"), Laplace(), DiscretizedLogistic(4)]
)
def test_diffusion_shows_the_datum_that_fits_best(likelihood: Any) -> None:
    x = torch.arange(12.0).reshape(4, 3) % 4
    model = DiffusionVAE(3, 3, likelihood=likelihood, network=DenoisingMLP(3, 8, 1))
    torch.testing.assert_close(model.reconstruct(x), x)


@torch.no_grad()
def test_diffusion_decodes_the_sd_of_the_last_noise() -> None:
    """That of z_0 / alpha, though the scale of a logistic distribution is another number."""
    sd, z = math.exp(-1.5), randn(4, 3)
    for likelihood in (Gaussian("decoded"), DiscretizedLogistic(256)):
        model = DiffusionVAE(3, 3, likelihood=likelihood, schedule=NoiseSchedule(-3.0, 3.0))
        fn = model.decoded(z)
        torch.manual_seed(0)
        unit = 1.0 if isinstance(likelihood, Gaussian) else 127.5  # levels for a number
        inner = DiscretizedLogisticDistribution(torch.zeros(()), fn.base_dist.scale[0, 0], 256)
        drawn = fn.sample((20_000,)) if unit == 1.0 else inner.sample((20_000, 1, 1))
        found = float((drawn - drawn.mean(0)).std()) / unit
        assert found == pytest.approx(sd, rel=0.03)  # the sd of that of a logistic's sd is 0.6 %


@pytest.mark.parametrize("model", [LadderVAE, HierarchicalVAE])
def test_seeds_of_drawn_layers(model: Any) -> None:
    hierarchy, z = model(DIM, (3, 2), likelihood=Gaussian(), hidden=(4,)), torch.zeros(4, 2)
    first, again, other, free, more = (
        hierarchy.decode(z, level=2, draw=True, seed=seed) for seed in (1, 1, 2, None, None)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(free, more)
    assert torch.equal(hierarchy.decode(z, level=2), hierarchy.decode(z, level=2))


class TestLabels:
    @staticmethod
    def model() -> SemiSupervisedVAE:
        torch.manual_seed(0)
        return SemiSupervisedVAE(DIM, CLASSES, latents=2, **parts())

    def test_unknown_ones_are_predicted(self) -> None:
        model, y = self.model(), torch.tensor([-1, 0, 1, 2, -1, -1])
        full = torch.where(y < 0, model.predict(REAL), y)
        for method in (model.encode, model.reconstruct):
            assert torch.equal(method(REAL, y), method(REAL, full.numpy()))
            assert not torch.equal(method(REAL, y), method(REAL, (full + 1) % CLASSES))

    @pytest.mark.parametrize("y", [[0, 3], [0, 0.7], [0], [0, -1], ["a", "b"], [0, math.nan]])
    def test_wrong_ones_are_refused(self, y: list) -> None:
        """Not rounded down, nor repeated."""
        model = self.model()
        calls = [lambda: model.sample(2, y), lambda: model.decode(torch.zeros(2, 2), y)]
        calls += (
            [] if -1 in y else [lambda: model.fit(REAL[:2], y), lambda: model.encode(REAL[:2], y)]
        )
        for call in calls:
            with pytest.raises(DataError, match="y must"):
                call()

    def test_no_scale_of_all_labels_alike(self) -> None:
        with pytest.raises(ModelError, match="over all labels"):
            SemiSupervisedVAE(DIM, CLASSES, likelihood=Gaussian("optimal"))


def test_y_beside_a_data_set() -> None:
    with pytest.raises(DataError, match="y goes with an array"):
        VAE(DIM, 2, **parts()).fit(torch.utils.data.TensorDataset(REAL), LABELS)


def test_rows_of_another_memory_layout() -> None:
    """Columns first, as in data frames: the same numbers, bit by bit."""
    x = randn(300, DIM)
    model, other = VAE(DIM, 2, **parts()), x.T.contiguous().T
    assert not other.is_contiguous() and torch.equal(other, x)
    assert model.data(other).is_contiguous() and model.data(other.numpy()).is_contiguous()
    assert torch.equal(model.encode(other), model.encode(x))


EMPTY: dict[str, Callable[[nn.Module], Any]] = {
    "vae": lambda m: VAE(2, 2, decoder=m).decoder,
    "ladder": lambda m: LadderVAE(2, (2, 1), decoder=m).decoder,
    "vq": lambda m: VQVAE(2, 4, 2, grid=1, encoder=m).encoder,
    "maps": lambda m: KLAutoencoder((1, 4, 4), 4, channels=(4,), encoder=m).encoder,
    "gan": lambda m: GAN(2, 2, generator=m).generator,
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_network_of_no_layers_is_a_network(name: str) -> None:
    """`nn.Sequential()` is the identity, though it counts as false."""
    identity = nn.Sequential()
    assert EMPTY[name](identity) is identity
