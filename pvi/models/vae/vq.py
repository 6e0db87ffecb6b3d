"""The vector-quantised autoencoder."""

import math
from collections.abc import Sequence
from typing import Any, Self

import pyro
import torch
from torch import Tensor, nn

import pvi
from pvi.errors import DataError, FitError, ModelError
from pvi.models.vae.autoregressive import AutoregressiveModel
from pvi.models.vae.base import LatentVariableModel
from pvi.models.vae.codes import Codes, Quantised, nearest
from pvi.models.vae.likelihoods import Bernoulli, Categorical, Likelihood
from pvi.nn import MLP, ConvDecoder, ConvEncoder
from pvi.nn.conv import image_shape, sizes
from pvi.nn.mlp import Shape, as_shape


class VQVAE(LatentVariableModel):
    """$z_p \\sim$ a codebook of K vectors, $x \\sim p(x \\mid \\mathrm{decoder}(z_1, ..., z_P))$.

    The guide takes the vectors nearest to what the encoder gives. It has probability 1 under the
    counting measure, so with the uniform prior

    $$\\log p(x) \\ge \\log p(x \\mid e_{k(x)}) - P \\log K.$$

    The encoder's gradient is that of the decoder's input ("straight-through", biased), and
    `pvi.penalty` holds it to its codes: $w \\sum_p \\|z_p - \\mathrm{sg}\\,e_p\\|^2$ besides the
    bound. The codebook has no gradient: in each step of a fit it moves to the running means of what
    was assigned to it, and codes that are hardly used are put at random encodings of the batch, as
    are nearly all of them in the first step, when nothing has been counted yet.

    The guide has one value, so `score_samples` and `pvi.diagnose` refuse: report the bound.

    Args:
        shape: of a datum, `D` or `(C, H, W)`.
        num_codes: K.
        code_dim: length D of a vector.
        grid: the positions, such as 8 or `(4, 4)`; `None` for those of the last level of
            convolutional networks.
        channels, blocks: of `ConvEncoder` and `ConvDecoder`, where `grid` is `None`.
        hidden: of each `MLP`, where it is given.
        encoder: from the likelihood's features to D * P numbers, channels first.
        decoder: from these to `likelihood.width` numbers for each element.
        likelihood: `Bernoulli` by default.
        commitment: w.
        decay: of the running means.
        revive: codes that are used less than this share of the mean are put elsewhere; 0 for none.
        prior: an `AutoregressiveModel` over codes, see `fit_prior`; `None` for the uniform one.

    Reference:
        van den Oord, Vinyals, Kavukcuoglu (2017), Neural Discrete Representation Learning, eq. 3;
        Razavi, van den Oord, Vinyals (2019), eq. 2 (running means); Dhariwal et al. (2020), Jukebox
        (revival).
    """

    codebook: Tensor
    counts: Tensor

    def __init__(
        self,
        shape: Shape,
        num_codes: int = 64,
        code_dim: int = 16,
        *,
        grid: Shape | None = None,
        channels: Sequence[int] = (32, 64),
        blocks: int = 0,
        hidden: Sequence[int] = (256, 256),
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        likelihood: Likelihood | None = None,
        commitment: float = 0.25,
        decay: float = 0.99,
        revive: float = 0.05,
        prior: AutoregressiveModel | None = None,
    ):
        super().__init__()
        self.shape, self.num_codes, self.code_dim = as_shape(shape), num_codes, code_dim
        self.grid, self.channels, self.blocks = grid, tuple(channels), blocks
        self.hidden, self.likelihood = tuple(hidden), likelihood or Bernoulli()
        self.commitment, self.decay, self.revive = commitment, decay, revive
        self._check()
        seen = tuple(self.likelihood.features(torch.zeros(1, *self.shape)).shape[1:])
        width = self.likelihood.width
        if grid is None:
            self.code_shape = sizes(image_shape(self.shape), len(self.channels))[-1]
            maps, options = (code_dim, *self.code_shape), {"channels": channels, "blocks": blocks}
            out = (width * self.shape[0], *self.shape[1:])
            default = ConvEncoder(seen, maps, **options), ConvDecoder(maps, out, **options)
        else:
            self.code_shape = as_shape(grid)
            numbers = code_dim * math.prod(self.code_shape)
            wide = width * math.prod(self.shape)
            default = MLP(seen, numbers, hidden), MLP(numbers, wide, hidden)
        self.encoder = default[0] if encoder is None else encoder
        self.decoder = default[1] if decoder is None else decoder
        self.prior = prior
        self.register_buffer("codebook", torch.randn(num_codes, code_dim))
        self.register_buffer("counts", torch.zeros(num_codes))

    @property
    def positions(self) -> int:
        """P."""
        return math.prod(self.code_shape)

    def model(self, x: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            fn = self.decoded(pyro.sample("z", self.prior_codes()))
            self.likelihood.learn(fn, x)
            pyro.sample("x", fn, obs=x)

    def guide(self, x: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            z = self.encodings(x)
            if self.training and torch.is_grad_enabled():
                self.learn(z.detach())
            fn = Quantised(z, self.codebook)
            far = (z - fn.embedded).square().sum((-2, -1))
            pvi.penalty("commitment", self.commitment * far)
            pyro.sample("z", fn)

    def prior_codes(self) -> Codes:
        """p(z), batch shape `()`."""
        density = None if self.prior is None else self.prior.density
        return Codes(self.codebook, self.positions, density)

    def encodings(self, x: Tensor) -> Tensor:
        """What the encoder gives for data: `(*batch, P, D)`."""
        z = self.encoder(self.likelihood.features(x))
        return z.reshape(*z.shape[:-1], self.code_dim, self.positions).mT

    def decoded(self, z: Tensor) -> Any:
        """$p(x \\mid z)$ for vectors `(*batch, P, D)`."""
        return self.likelihood(self.decoder(z.mT.flatten(-2)), self.shape, z.shape[:-2])

    @torch.no_grad()
    def learn(self, z: Tensor) -> None:
        """Move the codebook after a batch of encodings `(*batch, P, D)`.

        $$N_k \\leftarrow \\gamma N_k + (1 - \\gamma) n_k, \\qquad
        e_k \\leftarrow (\\gamma N_k e_k + (1 - \\gamma) \\sum_{i: k_i = k} z_i) / N_k$$
        """
        z = z.reshape(-1, self.code_dim).to(self.codebook)
        all_codes = torch.arange(self.num_codes, device=z.device)
        hits = (nearest(z, self.codebook).unsqueeze(-1) == all_codes).to(z)
        before = self.decay * self.counts
        counts = before + (1.0 - self.decay) * hits.sum(0)
        sums = before.unsqueeze(-1) * self.codebook + (1.0 - self.decay) * hits.T @ z
        used = counts > 0
        means = sums / torch.where(used, counts, 1.0).unsqueeze(-1)
        means = torch.where(used.unsqueeze(-1), means, self.codebook)
        average = len(z) / self.num_codes
        idle = counts < self.revive * average
        fresh = z[torch.randint(len(z), (self.num_codes,), device=z.device)]
        self.codebook.copy_(torch.where(idle.unsqueeze(-1), fresh, means))
        self.counts.copy_(torch.where(idle, average, counts))

    def encode(self, X: Any, y: Any = None) -> Tensor:
        """The codes of data, whole numbers below K: `(N, *code_shape)`."""
        found = self.in_batches(lambda x: nearest(self.encodings(x), self.codebook), self.data(X))
        return found.reshape(-1, *self.code_shape)

    def decode(self, z: Any, y: Any = None) -> Tensor:
        """Means of the data, given codes `(N, *code_shape)`.

        Raises:
            DataError: these are no codes.
        """
        codes = torch.as_tensor(z)
        shape = tuple(codes.shape[1:])
        whole = shape == self.code_shape and not codes.is_floating_point()
        if not whole or bool(((codes < 0) | (codes >= self.num_codes)).any()):
            raise DataError(
                f"codes are whole numbers from 0 to {self.num_codes - 1} of shape "
                f"(N, {', '.join(map(str, self.code_shape))}); got {codes.dtype} of shape "
                f"{tuple(codes.shape)}"
            )
        vectors = self.codebook[codes.flatten(1)]
        return self.in_batches(lambda z: self.likelihood.mean(self.decoded(z)), vectors)

    def prior_predictive(self, num_samples: int, *given: Any) -> Any:
        return self.decoded(self.prior_codes().sample((num_samples,)))

    def fit_prior(
        self, X: Any, *, network: nn.Module | None = None, batch_size: int = 128, **options: Any
    ) -> Self:
        """Learn the distribution of the codes of data; the bound and `sample` use it from then on.

        The rest of the model stays as it is. The prior's own fit is `prior.fit_`.

        Args:
            X: data, as in `fit`.
            network: of the `AutoregressiveModel`, for data `(1, h, w)` where codes are an `(h, w)`
                map, else for `code_shape`; its default.
            batch_size, options: as of `pvi.fit`.
        """
        shape = self.code_shape if len(self.code_shape) != 2 else (1, *self.code_shape)
        prior = AutoregressiveModel(shape, likelihood=Categorical(self.num_codes), network=network)
        codes = self.encode(X).reshape(-1, *shape).to(self.codebook)
        self.prior = prior.to(self.codebook).fit(codes, batch_size=batch_size, **options)
        return self

    def perplexity(self, X: Any = None) -> float:
        """How many codes are in use: $\\exp(-\\sum_k f_k \\log f_k)$, from 1 to K.

        Args:
            X: data whose codes have the shares f; by default the running ones of the last fit, in
                which a code that was put elsewhere starts with a mean share.

        Raises:
            FitError: there are no data, and no fit was before.
        """
        uses = self.counts
        if X is None and not bool(uses.any()):
            raise FitError("no codes were counted yet: call fit first, or give data")
        if X is not None:
            uses = torch.bincount(self.encode(X).flatten(), minlength=self.num_codes)
        shares = uses.double() / uses.sum().clamp(min=1e-12)
        return float(torch.special.entr(shares).sum().exp())

    def _check(self) -> None:
        if self.num_codes < 2 or self.code_dim < 1:
            raise ModelError(f"needs num_codes >= 2, got {self.num_codes}, {self.code_dim}")
        shares = {"decay": self.decay, "revive": self.revive}
        for name, value in shares.items():
            if not 0.0 <= value < 1.0:
                raise ModelError(f"{name} must be from 0 to below 1, got {value}")
        if not self.commitment >= 0.0:
            raise ModelError(f"commitment must be >= 0, got {self.commitment}")
