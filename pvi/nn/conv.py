"""Convolutional encoders and decoders for images of any size, and a discriminator of patches."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate

from pvi.errors import ModelError
from pvi.nn.component import Component
from pvi.nn.mlp import Shape, as_shape

GROUPS = 8  # of a GroupNorm, where the channels can be divided so


class ConvEncoder(Component):
    """Images to vectors: each level halves height and width (rounded up).

    `(*batch, C, H, W)` to `(*batch, n)`.

    Args:
        inputs: `(C, H, W)`.
        outputs: n, from a dense layer; or channels, height and width of a map, given as a vector,
            with the last level's height and width (see `sizes`), from a convolution: the latents
            then keep their place in the image.
        channels: of each level.
        blocks: residual blocks at each level; with some of them it is a ResNet.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Shape,
        channels: Sequence[int] = (32, 64),
        blocks: int = 0,
    ):
        super().__init__()
        self.inputs, self.outputs = image_shape(inputs), outputs
        self.channels, self.blocks = tuple(channels), blocks
        size = sizes(self.inputs, len(self.channels))[-1]
        parts: list[nn.Module] = [nn.Conv2d(self.inputs[0], self.channels[0], 3, padding=1)]
        before = self.channels[0]
        for width in self.channels:
            down = nn.Conv2d(before, width, 3, stride=2, padding=1)
            parts += [*activated(before), down, *(Residual(width) for _ in range(blocks))]
            before = width
        parts += activated(before)
        if len(as_shape(outputs)) == 1:
            parts += [nn.Flatten(), nn.Linear(before * math.prod(size), as_shape(outputs)[0])]
        else:
            check_map(outputs, size)
            parts += [nn.Conv2d(before, as_shape(outputs)[0], 3, padding=1), nn.Flatten()]
        self.layers = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return on_images(self.layers, x, self.inputs)


class ConvDecoder(Component):
    """Vectors to images: each level doubles height and width, as `ConvEncoder` halves them.

    `(*batch, n)` to `(*batch, C, H, W)`. Enlarging by copies and convolving after that leaves no
    pattern of a checkerboard (Odena et al. 2016).

    Args:
        inputs: n, or channels, height and width of a map that is given as a vector.
        outputs: `(C, H, W)`.
        channels: of each level, in the encoder's order: the last ones come first.
        blocks: as of `ConvEncoder`.
    """

    def __init__(
        self,
        inputs: Shape,
        outputs: Sequence[int],
        channels: Sequence[int] = (32, 64),
        blocks: int = 0,
    ):
        super().__init__()
        self.inputs, self.outputs = inputs, image_shape(outputs)
        self.channels, self.blocks = tuple(channels), blocks
        *larger, size = sizes(self.outputs, len(self.channels))
        before = self.channels[-1]
        if len(as_shape(inputs)) == 1:
            dense = nn.Linear(as_shape(inputs)[0], before * math.prod(size))
            parts: list[nn.Module] = [dense, nn.Unflatten(1, (before, *size))]
        else:
            check_map(inputs, size)
            parts = [nn.Unflatten(1, as_shape(inputs))]
            parts += [nn.Conv2d(as_shape(inputs)[0], before, 3, padding=1)]
        ends = [self.channels[0], *self.channels[:-1]]
        for width, to in zip(reversed(ends), reversed(larger), strict=True):
            parts += [Residual(before) for _ in range(blocks)]
            parts += [*activated(before), Enlarge(to), nn.Conv2d(before, width, 3, padding=1)]
            before = width
        self.layers = nn.Sequential(*parts, *activated(before))
        self.last = nn.Conv2d(before, self.outputs[0], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        n = math.prod(as_shape(self.inputs))
        if z.shape[-1] != n:
            raise ModelError(
                f"a decoder of vectors of {n} numbers got a tensor of shape {tuple(z.shape)}"
            )
        x = self.last(self.layers(z.reshape(-1, n)))
        return x.reshape(*z.shape[:-1], *self.outputs)


class PatchDiscriminator(Component):
    """Scores of overlapping patches of an image: `(*batch, C, H, W)` to `(*batch, h * w)`.

    Args:
        inputs: `(C, H, W)`.
        channels: of each level, which halves height and width; a score sees squares of
            7, 15, 31, ... pixels.

    Reference:
        Isola et al. (2017), Image-to-Image Translation with Conditional Adversarial Networks; with
        GroupNorm in the place of BatchNorm, so that a score belongs to one image.
    """

    def __init__(self, inputs: Sequence[int], channels: Sequence[int] = (32, 64)):
        super().__init__()
        self.inputs, self.channels = image_shape(inputs), tuple(channels)
        before, parts = self.inputs[0], []
        for i, width in enumerate(self.channels):
            norm = [norm_of(width)] if i else []
            down = nn.Conv2d(before, width, 3, stride=2, padding=1)
            parts += [down, *norm, nn.LeakyReLU(0.2)]
            before = width
        self.layers = nn.Sequential(*parts, nn.Conv2d(before, 1, 3, padding=1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return on_images(self.layers, x, self.inputs)


class Residual(nn.Module):
    """$x + f(x)$ with two normalised convolutions (He et al. 2016).

    Args:
        channels: of x.
    """

    def __init__(self, channels: int):
        super().__init__()
        one, two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.layers = nn.Sequential(*activated(channels), one, *activated(channels), two)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Enlarge(nn.Module):
    """Copies of each pixel, up to a size.

    Args:
        size: height and width.
    """

    def __init__(self, size: Sequence[int]):
        super().__init__()
        self.size = tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        return interpolate(x, self.size)


def sizes(shape: Sequence[int], levels: int) -> list[tuple[int, int]]:
    """Height and width of an image, and after each level.

    >>> sizes((1, 28, 21), 2)
    [(28, 21), (14, 11), (7, 6)]
    """
    found = [(shape[1], shape[2])]
    for _ in range(levels):
        h, w = found[-1]
        found.append((-(-h // 2), -(-w // 2)))
    return found


def image_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape `(C, H, W)`.

    Raises:
        ModelError: it is another.
    """
    if isinstance(shape, int) or len(shape) != 3:
        raise ModelError(f"a convolutional network needs images (C, H, W), got the shape {shape}")
    return tuple(shape)


def check_map(shape: Shape, size: tuple[int, int]) -> None:
    """Refuse a map of another size than the last level's.

    Raises:
        ModelError: with the size that it must have.
    """
    if len(as_shape(shape)) != 3 or as_shape(shape)[1:] != size:
        raise ModelError(
            f"a map of latents must have shape (channels, {size[0]}, {size[1]}) here, as the last "
            f"level has; got {shape}. Change it, or the number of levels."
        )


def norm_of(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def activated(channels: int) -> list[nn.Module]:
    return [norm_of(channels), nn.SiLU()]


def on_images(layers: nn.Module, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Layers from `(n, C, H, W)` to `(n, any)` on a tensor with any dimensions before these.

    Raises:
        ModelError: x has another shape.
    """
    if tuple(x.shape[-3:]) != tuple(shape):
        raise ModelError(
            f"a network for images of shape {tuple(shape)} got a tensor of shape {tuple(x.shape)}"
        )
    found = layers(x.reshape(-1, *shape))
    return found.reshape(*x.shape[:-3], found.shape[-1])
