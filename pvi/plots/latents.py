"""What the latents of a model of images stand for: images at chosen values of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvi.engine.traces import free, sample_nodes
from pvi.errors import PviError
from pvi.plots.images import plot_images
from pvi.posterior.rows import RowWise, is_discrete

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 2.5  # prior sds on either side of a traversal
STEPS = 9
MOST, LOOK = 8, 500  # numbers that are traversed, rows that say which vary most
Shape = tuple[int, int] | None


def plot_traversals(
    target: Any,
    data: Any = None,
    *,
    site: str | None = None,
    observed: str | None = None,
    image_shape: Shape = None,
    row: int = 0,
    numbers: Sequence[int] | None = None,
    values: Sequence[float] | None = None,
) -> "Figure":
    """Each number of a latent moved alone, the others at the posterior mean of one row.

    Shown is the mean of the observation given the latents. Other latents stay at their posterior
    means too, those that the model draws given this one as well.

    Args:
        target: a `Posterior` or a `Fit`, whose guide has latents in the data's plate.
        data: other data, as in `pvi.fit`; by default the training data.
        site: the continuous latent; not needed if there is one.
        observed: the observed site; not needed if one holds images.
        image_shape: height and width of an image; not needed if rows of the site have them.
        row: whose posterior mean.
        numbers: which of the latent's numbers; by default the 8 whose posterior means vary most.
        values: what they are set to; by default 9 steps, 2.5 prior sds on either side of the prior
            mean.

    Raises:
        PviError, DataError: no such latent, no image, values outside the latent's support.
    """
    with _pictures(target, data, observed, image_shape, 0) as p:
        site = p.latent(site)
        rows = p.rows([row])
        base = p.codes(site, rows)
        chosen = _most_varied(p, site) if numbers is None else list(numbers)
        if not chosen or not all(0 <= i < base.shape[1] for i in chosen):
            raise PviError(f"numbers: expected 0 to {base.shape[1] - 1} of '{site}', got {chosen}")
        steps = _steps(p, site, rows, chosen, values)
        images = {}
        for i, line in zip(chosen, steps, strict=True):
            codes = base.repeat(len(line), 1)
            codes[:, i] = line
            images[f"{site}[{i}]"] = p.decode(rows.repeat(len(line)), site, codes)
        sds = torch.linspace(-WIDTH, WIDTH, STEPS).tolist()
        titles = [f"{float(v):.3g}" for v in (sds if values is None else values)]
        return plot_images(images, steps.shape[1], titles)


def plot_interpolations(
    target: Any,
    data: Any = None,
    *,
    site: str | None = None,
    observed: str | None = None,
    image_shape: Shape = None,
    pairs: Sequence[tuple[int, int]] = ((0, 1), (2, 3), (4, 5)),
) -> "Figure":
    """The way from one row's posterior mean to another's, straight, and the rows themselves.

    Args:
        target, data, site, observed, image_shape: as in `plot_traversals`.
        pairs: numbers of rows, from and to. Everything but the latent stays that of the first.
    """
    with _pictures(target, data, observed, image_shape, 0) as p:
        site = p.latent(site)
        if not pairs:
            raise PviError("pairs: expected at least one (from, to), got none")
        images = {}
        for one, two in pairs:
            rows = p.rows([one, two])
            a, b = p.codes(site, rows)
            line = torch.lerp(a, b, torch.linspace(0, 1, STEPS).to(a)[:, None])
            middle = p.decode(rows[:1].repeat(STEPS), site, line)
            ends = p.data(rows)
            images[f"{one} to {two}"] = torch.cat([ends[:1], middle, ends[1:]])
        return plot_images(images, STEPS + 2, ["data", *[""] * STEPS, "data"])


def plot_reconstructions(
    target: Any,
    data: Any = None,
    *,
    observed: str | None = None,
    image_shape: Shape = None,
    rows: Sequence[int] = tuple(range(10)),
) -> "Figure":
    """Rows of the data above the mean of the observation at the posterior means of the latents.

    Args:
        target, data, observed, image_shape: as in `plot_traversals`.
        rows: their numbers.
    """
    with _pictures(target, data, observed, image_shape, 0) as p:
        chosen = p.rows(rows)
        rebuilt = p.images(p.at.run(chosen, p.at.draw(chosen, mean=True)))
        return plot_images({"data": p.data(chosen), "reconstructed": rebuilt}, len(rows))


def plot_samples(
    target: Any,
    data: Any = None,
    *,
    observed: str | None = None,
    image_shape: Shape = None,
    num_images: int = 10,
    seed: int = 0,
) -> "Figure":
    """Random rows of the data, of what the average posterior makes, and of what the prior makes.

    Latents of rows are drawn from the guide at random rows of the data, or from the model; others
    are at their posterior mean. If the prior's images look worse than the average posterior's, the
    two differ: `pvi.latents` says by how many nats. Covariates are those of the rows above.

    Args:
        target, data, observed, image_shape: as in `plot_traversals`.
        num_images: in a row of the figure.
        seed: of the rows and the draws.
    """
    with _pictures(target, data, observed, image_shape, seed) as p:
        order = torch.randperm(p.at.size)
        rows = p.rows([int(order[i % len(order)]) for i in range(num_images)])
        drawn, means = p.at.draw(rows), p.at.draw(rows, mean=True)
        model = p.at.run(rows, means)
        shared = {n: x for n, x in means.items() if n not in p.local(model)}
        images = {"data": p.data(rows)}
        images["average posterior"] = p.images(p.at.run(rows, drawn | shared))
        for label in ("prior", "prior "):
            images[label] = p.images(p.at.run(rows, shared, free(p.at.model)))
        return plot_images(images, num_images)


@contextmanager
def _pictures(
    target: Any, data: Any, observed: str | None, shape: Shape, seed: int
) -> Iterator["_Pictures"]:
    posterior = getattr(target, "posterior", target)
    posterior = posterior if data is None else posterior.on(data)
    with posterior.drawing(seed) as runner:
        if summed := runner.plan.enumeration.summed:
            names = ", ".join(str(name) for name in summed)
            raise PviError(
                f"'{names}' is summed over by the model, so no image belongs to single values of "
                "it: draw it in the guide, or show posterior.predict()"
            )
        yield _Pictures(RowWise(posterior), observed, shape)


@dataclass
class _Pictures:
    """Images `(n, height, width)` of an observed site; everything by numbers of rows."""

    at: RowWise
    observed: str | None
    shape: Shape
    site: str = field(init=False)

    def __post_init__(self) -> None:
        rows = torch.arange(1, device=self.at.data.device)
        nodes = sample_nodes(self.at.run(rows, self.at.draw(rows)))
        shapes = {
            name: self._by_rows(node["value"], node)[0].squeeze().shape
            for name, node in nodes.items()
            if node["is_observed"] and self.at.dim(node) is not None
        }
        want = self.shape
        fits: dict[str, Any] = {
            name: want or tuple(shape)
            for name, shape in shapes.items()
            if (shape.numel() == prod(want) if want else len(shape) == 2)
        }
        if self.observed is not None:
            fits = {name: shape for name, shape in fits.items() if name == self.observed}
        if len(fits) != 1:
            sizes = {name: tuple(shape) for name, shape in shapes.items()}
            raise PviError(
                f"expected one observed site whose rows are images of shape {want or '(h, w)'}; "
                f"the rows of the observed sites have {sizes}: give image_shape=(height, width), "
                "or observed= where several fit"
            )
        (self.site, self.shape), *_ = fits.items()

    def rows(self, numbers: Sequence[int]) -> Tensor:
        if not numbers or not all(0 <= i < self.at.size for i in numbers):
            raise PviError(f"expected rows from 0 to {self.at.size - 1}, got {list(numbers)}")
        return torch.tensor(list(numbers), device=self.at.data.device)

    def local(self, trace: Any) -> list[str]:
        """Latents of single rows."""
        nodes = sample_nodes(trace).items()
        return [n for n, x in nodes if not x["is_observed"] and self.at.dim(x) is not None]

    def latent(self, site: str | None) -> str:
        rows = torch.arange(1, device=self.at.data.device)
        values = self.at.draw(rows)
        trace = self.at.run(rows, values)
        known = [n for n in self.local(trace) if n in values]
        known = [n for n in known if not is_discrete(trace.nodes[n]["fn"])]
        if (site is None and len(known) == 1) or site in known:
            return site or known[0]
        raise PviError(f"site: expected one of the continuous latents of rows {known}, got {site}")

    def codes(self, site: str, rows: Tensor) -> Tensor:
        """Posterior means `(rows, numbers)`."""
        values = self.at.draw(rows, mean=True)
        node = self.at.run(rows, values).nodes[site]
        return self._by_rows(values[site], node).flatten(1)

    def prior(self, site: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Means and sds `(rows, numbers)` of the latent in the model."""
        node = self.at.run(rows, self.at.draw(rows, mean=True)).nodes[site]
        moments = (node["fn"].mean, node["fn"].stddev)
        shape = node["value"].shape
        mean, sd = (self._by_rows(x.expand(shape), node).flatten(1) for x in moments)
        return mean, sd

    def decode(self, rows: Tensor, site: str, codes: Tensor) -> Tensor:
        values = self.at.draw(rows, mean=True)
        node = self.at.run(rows, values).nodes[site]
        front = self._by_rows(values[site], node)
        dim = (self.at.dim(node) or 0) - node["fn"].event_dim
        value = codes.reshape(front.shape).movedim(0, dim)
        if not bool(node["fn"].support.check(value).all()):
            raise PviError(f"these values are outside the support of '{site}': give values= in it")
        return self.images(self.at.run(rows, values | {site: value}))

    def images(self, trace: Any) -> Tensor:
        """The mean of the observation in a run of the model."""
        node = trace.nodes[self.site]
        try:
            mean = node["fn"].mean.expand(node["value"].shape)
        except NotImplementedError as error:
            raise PviError(
                f"the distribution of '{self.site}' has no mean in closed form to be shown"
            ) from error
        if bool(mean.isnan().any()):
            raise PviError(f"'{self.site}' has no mean to be shown (NaN), as classes have none")
        return self._by_rows(mean, node).reshape(-1, *self.shape or ()).cpu()

    def data(self, rows: Tensor) -> Tensor:
        node = self.at.run(rows, self.at.draw(rows)).nodes[self.site]
        return self._by_rows(node["value"], node).reshape(-1, *self.shape or ()).cpu()

    def _by_rows(self, x: Tensor, node: Any) -> Tensor:
        """`(*batch, *event)` with the rows first."""
        return x.movedim((self.at.dim(node) or 0) - node["fn"].event_dim, 0)


def _most_varied(p: _Pictures, site: str) -> list[int]:
    rows = torch.arange(min(p.at.size, LOOK), device=p.at.data.device)
    variance = p.codes(site, rows).var(0, correction=0)
    return variance.argsort(descending=True)[:MOST].tolist()


def _steps(
    p: _Pictures, site: str, rows: Tensor, chosen: list[int], values: Sequence[float] | None
) -> Tensor:
    """`(numbers, steps)`."""
    if values is not None:
        if not len(values):
            raise PviError("values: expected at least one, got none")
        return torch.as_tensor([float(v) for v in values], device=rows.device).repeat(
            len(chosen), 1
        )
    try:
        mean, sd = (x[0, chosen, None] for x in p.prior(site, rows))
    except NotImplementedError as error:
        raise PviError(f"the prior of '{site}' has no sd in closed form: give values=") from error
    return mean + sd * torch.linspace(-WIDTH, WIDTH, STEPS).to(sd)


__all__ = ["plot_interpolations", "plot_reconstructions", "plot_samples", "plot_traversals"]
