"""The gated PixelCNN: an autoregressive network of images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from pvi.errors import ModelError
from pvi.nn.component import Component
from pvi.nn.conv import image_shape
from pvi.nn.made import check_context, flat_elements


class PixelCNN(Component):
    """Numbers for each element of an image that depend on the pixels before it alone.

    Pixels are in the order of reading, and the channels of a pixel one after the other. A stack of
    convolutions sees the rows above, and a second one the pixels to the left and the first stack,
    so that nothing before is out of sight: `(*batch, C, H, W)` to `(*batch, width, C, H, W)`.

    Args:
        shape: `(C, H, W)`.
        width: how many numbers for each element.
        channels: of the hidden layers, at least C.
        layers: how many; with the first, all are gated by $\\tanh(a) \\odot \\sigma(b)$.
        kernel: odd size of the convolutions; pixels further away than `layers * (kernel // 2)` are
            not seen.
        features, context: as of `MADE`.

    Reference:
        van den Oord et al. (2016), Conditional Image Generation with PixelCNN Decoders, eq. 2 and
        figure 2.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 1,
        channels: int = 32,
        layers: int = 4,
        kernel: int = 3,
        *,
        features: int = 1,
        context: int = 0,
    ):
        super().__init__()
        self.shape, self.width, self.channels = image_shape(shape), width, channels
        self.layers, self.kernel = layers, kernel
        self.features, self.context = features, context
        colours = self.shape[0]
        if channels < colours or layers < 1 or kernel % 2 == 0:
            raise ModelError(
                f"a PixelCNN of {colours} colours needs channels >= {colours}, layers >= 1 and an "
                f"odd kernel, got {channels}, {layers}, {kernel}"
            )
        groups = torch.arange(channels) * colours // channels  # the colour a channel belongs to
        inputs = torch.arange(colours).repeat_interleave(features)
        given = colours * context
        self.gated = nn.ModuleList(
            GatedLayer(groups if i else inputs, groups, kernel, given, first=i == 0)
            for i in range(layers)
        )
        outputs = torch.arange(colours).repeat(width)
        self.mix = CentreMasked(groups, groups, strict=False)
        self.last = CentreMasked(groups, outputs, strict=False)

    @property
    def order(self) -> Tensor:
        """The places of `x.flatten()` in the order of the conditionals, `(n,)`."""
        c, h, w = self.shape
        return torch.arange(c * h * w).reshape(c, h, w).permute(1, 2, 0).flatten()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = flat_elements(x, self.shape, self.features)
        check_context(context, self.context)
        c, h, w = self.shape
        batch = x.shape[:-1]
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[: context.dim() - 4])
            context = context.expand(*batch, self.context, c, h, w)
            context = context.reshape(-1, self.context * c, h, w)
        x = x.expand(*batch, x.shape[-1]).reshape(-1, c, h, w, self.features)
        x = x.movedim(-1, 2).reshape(-1, c * self.features, h, w)
        above, left = x, x
        for layer in self.gated:
            above, left = layer(above, left, context)
        x = self.last(self.mix(left.relu()).relu())
        return x.reshape(*batch, self.width, c, h, w)


class GatedLayer(nn.Module):
    """One layer of both stacks.

    Args:
        inputs, groups: the colour that each channel belongs to, of the input and of the output.
        kernel: size of the convolutions.
        context: channels of the context; 0 for none.
        first: the centre is not to be seen, and is not added.
    """

    def __init__(self, inputs: Tensor, groups: Tensor, kernel: int, context: int, first: bool):
        super().__init__()
        n, double = len(groups), groups.repeat(2)
        self.reach, self.first = kernel // 2, first
        self.rows = nn.Conv2d(len(inputs), 2 * n, (self.reach + 1, kernel))
        self.link = nn.Conv2d(2 * n, 2 * n, 1)
        self.columns = CentreMasked(inputs, double, strict=first, reach=self.reach)
        self.out = CentreMasked(groups, groups, strict=False)
        self.given = nn.Conv2d(context, 4 * n, 1) if context else None

    def forward(self, above: Tensor, left: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        k = self.reach
        rows = self.rows(pad(above, (k, k, k, 0)))  # this row and those above it
        before = pad(rows, (0, 0, 1, 0))[..., :-1, :]
        columns = self.columns(left) + self.link(before)
        if self.given is not None and context is not None:
            one, two = self.given(context).chunk(2, 1)
            rows, columns = rows + one, columns + two
        found = self.out(gate(columns))
        return gate(rows), found if self.first else left + found


class CentreMasked(nn.Conv2d):
    """A convolution over a pixel and some to its left, whose own colours are seen in their order.

    Args:
        inputs, outputs: the colour that each channel belongs to.
        strict: a colour does not see itself.
        reach: how many pixels to the left.
    """

    mask: Tensor

    def __init__(self, inputs: Tensor, outputs: Tensor, *, strict: bool, reach: int = 0):
        super().__init__(len(inputs), len(outputs), (1, reach + 1))
        self.reach = reach
        seen = inputs.unsqueeze(0) < outputs.unsqueeze(1) + (not strict)
        mask = torch.ones_like(self.weight, dtype=torch.bool)
        mask[..., -1] = seen.unsqueeze(-1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return conv2d(pad(input, (self.reach, 0)), self.weight * self.mask, self.bias)


def gate(x: Tensor) -> Tensor:
    one, two = x.chunk(2, 1)
    return one.tanh() * two.sigmoid()
