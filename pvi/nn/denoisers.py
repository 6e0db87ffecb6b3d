"""Networks of noisy data and a noise level, as diffusion models need them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from pvi.errors import ModelError
from pvi.nn.component import Component
from pvi.nn.conv import image_shape, norm_of, sizes
from pvi.nn.mlp import Shape, as_shape, flat

FREQUENCIES = 16  # of the sines and cosines that a noise level is given as


class LevelFeatures(nn.Module):
    """A noise level in [0, 1] as sines and cosines of 1 to 1,000 turns, through one layer.

    Args:
        outputs: how many numbers.
    """

    turns: Tensor

    def __init__(self, outputs: int):
        super().__init__()
        turns = torch.logspace(0, 3, FREQUENCIES) * 2 * math.pi
        self.register_buffer("turns", turns, persistent=False)
        self.layer = nn.Linear(2 * FREQUENCIES + 1, outputs)

    def forward(self, level: Tensor) -> Tensor:
        angles = level[..., None] * self.turns
        return silu(self.layer(torch.cat([level[..., None], angles.sin(), angles.cos()], -1)))


class DenoisingMLP(Component):
    """Residual layers $h \\leftarrow h + W\\,a(V (h + e))$, e made of the noise level.

    Args:
        shape: of a datum.
        width: of h.
        layers: how many.
    """

    def __init__(self, shape: Shape, width: int = 256, layers: int = 3):
        super().__init__()
        self.shape, self.width, self.layers = as_shape(shape), width, layers
        size = math.prod(self.shape)
        self.first, self.last = nn.Linear(size, width), nn.Linear(width, size)
        self.levels = nn.ModuleList(LevelFeatures(width) for _ in range(layers))
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        silent(self.last)

    def forward(self, z: Tensor, level: Tensor) -> Tensor:
        """A guess of $v = \\alpha \\epsilon - \\sigma y$ where $z = \\alpha y + \\sigma \\epsilon$.

        Args:
            z: `(*batch, *shape)`.
            level: `(*batch)`, from 0 (no noise) to 1.
        """
        h = self.first(flat(z, self.shape))
        for features, inner, outer in zip(self.levels, self.inner, self.outer, strict=True):
            h = h + outer(silu(inner(h + features(level))))
        return self.last(h).reshape(z.shape)


class UNet(Component):
    """Residual convolutions that halve and double the image, with what was halved added again.

    Args:
        shape: `(C, H, W)`.
        channels: of each level; the next has half the height and width.

    Reference:
        Ronneberger et al. (2015), U-Net; Ho et al. (2020), Denoising Diffusion Probabilistic
        Models.
    """

    def __init__(self, shape: Sequence[int], channels: Sequence[int] = (32, 64)):
        super().__init__()
        self.shape, self.channels = image_shape(shape), tuple(channels)
        if not channels:
            raise ModelError("channels: expected one number for each level of a UNet, got none")
        self.sizes = sizes(self.shape, len(self.channels) - 1)
        self.first = nn.Conv2d(self.shape[0], self.channels[0], 3, padding=1)
        self.down = nn.ModuleList(Noisy(width) for width in self.channels)
        pairs = list(zip(self.channels, self.channels[1:], strict=False))
        self.smaller = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.larger = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in pairs)
        self.up = nn.ModuleList(Noisy(width) for width in self.channels)
        self.last = nn.Conv2d(self.channels[0], self.shape[0], 3, padding=1)
        silent(self.last)

    def forward(self, z: Tensor, level: Tensor) -> Tensor:
        """A guess of v, as of `DenoisingMLP`."""
        level = level.expand(z.shape[:-3]).reshape(-1)
        h, kept = self.first(z.reshape(-1, *self.shape)), []
        for i, block in enumerate(self.down):
            h = block(h if i == 0 else self.smaller[i - 1](h), level)
            kept.append(h)
        h = self.up[-1](h, level)
        for i in reversed(range(len(self.larger))):
            h = kept[i] + self.larger[i](interpolate(h, self.sizes[i]))
            h = self.up[i](h, level)
        return self.last(silu(h)).reshape(z.shape)


def silent(layer: nn.Module) -> None:
    """Start a layer at 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Noisy(nn.Module):
    """A residual block of two convolutions, with the noise level between them.

    Args:
        channels: of its images.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.before, self.after = norm_of(channels), norm_of(channels)
        self.level = LevelFeatures(channels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.one(silu(self.before(x))) + self.level(level)[..., None, None]
        return x + self.two(silu(self.after(h)))
