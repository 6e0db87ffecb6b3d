"""Images of latents: a linear decoder whose images are known exactly, and what is refused."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import pvi
from pvi.errors import DataError, PviError
from pvi.plots import plot_interpolations, plot_reconstructions, plot_samples, plot_traversals

RNG = torch.Generator().manual_seed(0)
DECODER = torch.randn(3, 16, generator=RNG)
ENCODER = torch.linalg.pinv(DECODER)
X = torch.randn(12, 16, generator=RNG)
SIDE, OFFSET = (4, 4), 0.5


def model(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(torch.ones(3), 2.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ DECODER + shift[..., None], 0.1).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    pyro.sample("shift", dist.Normal(OFFSET, 0.1))
    with pyro.plate("row", len(x)):
        pyro.sample("z", dist.Normal(x @ ENCODER, 0.3).to_event(1))


def posterior(rows: Any = X) -> pvi.Posterior:
    return pvi.Posterior(model, guide, (rows,))


def shown(figure: Any) -> np.ndarray:
    """Every image, row by row of the figure."""
    return np.stack([np.asarray(a.images[0].get_array()) for a in figure.axes if a.images])


def decoded(z: Tensor) -> np.ndarray:
    return (z @ DECODER + OFFSET).reshape(-1, *SIDE).numpy()


def test_traversals_move_one_number_over_the_prior() -> None:
    figure = plot_traversals(posterior(), image_shape=SIDE, row=3, numbers=[2, 0])
    codes = (X[3] @ ENCODER).repeat(2, 9, 1)
    steps = 1.0 + 2.0 * torch.linspace(-2.5, 2.5, 9)  # prior mean 1, sd 2
    codes[0, :, 2], codes[1, :, 0] = steps, steps
    np.testing.assert_allclose(shown(figure), decoded(codes.flatten(0, 1)), atol=1e-5)
    given = plot_traversals(posterior(), image_shape=SIDE, numbers=[1], values=[7.0])
    code = (X[0] @ ENCODER).clone()
    code[1] = 7.0
    np.testing.assert_allclose(shown(given), decoded(code), atol=1e-5)


def test_numbers_that_vary_most_come_first() -> None:
    order = (X @ ENCODER).var(0).argsort(descending=True).tolist()
    figure = plot_traversals(posterior(), image_shape=SIDE)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == [f"z[{i}]" for i in order]


def test_interpolations_are_straight_between_the_rows() -> None:
    figure = plot_interpolations(posterior(), image_shape=SIDE, pairs=[(2, 5)])
    a, b = X[2] @ ENCODER, X[5] @ ENCODER
    line = torch.stack([a + (b - a) * t for t in torch.linspace(0, 1, 9)])
    images = shown(figure)
    np.testing.assert_allclose(images[1:-1], decoded(line), atol=1e-5)
    np.testing.assert_array_equal(images[[0, -1]], X[[2, 5]].reshape(-1, *SIDE).numpy())


def test_reconstructions_stand_below_their_rows() -> None:
    images = shown(plot_reconstructions(posterior(), image_shape=SIDE, rows=[4, 1]))
    np.testing.assert_array_equal(images[:2], X[[4, 1]].reshape(-1, *SIDE).numpy())
    np.testing.assert_allclose(images[2:], decoded(X[[4, 1]] @ ENCODER), atol=1e-5)
    new = X.flip(0)
    images = shown(plot_reconstructions(posterior(), new, image_shape=SIDE, rows=[0]))
    np.testing.assert_array_equal(images[0], new[0].reshape(SIDE).numpy())


def test_samples_have_the_spread_of_posterior_and_prior() -> None:
    images = torch.as_tensor(shown(plot_samples(posterior(), image_shape=SIDE, num_images=60)))
    _, average, *prior = images.reshape(4, 60, 16).float().unbind()
    z = (average - OFFSET) @ ENCODER
    want = (X @ ENCODER).mean(0)
    sd = ((X @ ENCODER).var(0, correction=0) + 0.3**2).sqrt()
    assert bool(((z.mean(0) - want).abs() < 4 * sd / 60**0.5).all())
    z = (torch.cat(prior) - OFFSET) @ ENCODER
    assert bool(((z.mean(0) - 1.0).abs() < 4 * 2.0 / 120**0.5).all())
    assert bool(((z.std(0) / 2.0 - 1.0).abs() < 4 / 240**0.5).all())


def test_guides_with_parameters_for_each_row_show_theirs() -> None:
    codes = torch.randn(len(X), 3, generator=RNG)

    def table(x: Tensor) -> None:
        pyro.sample("shift", dist.Normal(OFFSET, 0.1))
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal(codes, 0.3).to_event(1))

    fixed = pvi.Posterior(model, table, (X,))
    images = shown(plot_reconstructions(fixed, image_shape=SIDE, rows=[3, 0]))
    np.testing.assert_allclose(images[2:], decoded(codes[[3, 0]]), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"image_shape": None}, "give image_shape"),
        ({"image_shape": (3, 4)}, r"'x': \(16,\)"),
        ({"observed": "q"}, "observed"),
        ({"site": "shift"}, r"continuous latents of rows \['z'\]"),
        ({"row": 12}, "rows from 0 to 11"),
        ({"numbers": [3]}, "0 to 2"),
        ({"numbers": []}, "0 to 2"),
        ({"values": []}, "values"),
    ],
)
def test_traversals_say_what_they_need(options: dict[str, Any], word: str) -> None:
    with pytest.raises(PviError, match=word):
        plot_traversals(posterior(), **{"image_shape": SIDE, **options})


def test_other_wrong_input_is_named() -> None:
    with pytest.raises(PviError, match="pairs"):
        plot_interpolations(posterior(), image_shape=SIDE, pairs=[])
    with pytest.raises(PviError, match="rows from 0"):
        plot_samples(posterior(), image_shape=SIDE, num_images=0)


def test_discrete_and_enumerated_latents_are_refused() -> None:
    def binary(x: Tensor) -> None:
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z @ DECODER, 0.1).to_event(1), obs=x)

    def encoder(x: Tensor) -> None:
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x @ ENCODER).to_event(1))

    discrete = pvi.Posterior(binary, encoder, (X,))
    with pytest.raises(PviError, match="continuous latents"):
        plot_traversals(discrete, image_shape=SIDE)
    plot_reconstructions(discrete, image_shape=SIDE)

    def mixed(x: Tensor) -> None:
        with pyro.plate("row", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ DECODER + k[..., None], 0.1).to_event(1), obs=x)

    def normal(x: Tensor) -> None:
        with pyro.plate("row", len(x)):
            pyro.sample("z", dist.Normal(x @ ENCODER, 0.3).to_event(1))

    with pytest.raises(PviError, match="'k' is summed over"):
        plot_traversals(pvi.Posterior(mixed, normal, (X,)), image_shape=SIDE)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


def learnt(x: Tensor) -> None:
    pyro.sample("shift", dist.Normal(pyro.param("shift_loc", torch.tensor(0.0)), 0.1))
    with pyro.plate("row", len(x)):
        pyro.sample("z", dist.Normal(x @ ENCODER, 0.3).to_event(1))


def test_streams_are_refused() -> None:
    loader = DataLoader(Stream(), batch_size=4)
    fit = pvi.fit(model, learnt, loader, num_data=12, steps=2, seed=0)
    with pytest.raises(DataError, match="stream"):
        plot_reconstructions(fit, image_shape=SIDE)
