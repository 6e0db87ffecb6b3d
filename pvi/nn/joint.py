"""One network of several inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pvi.nn.component import Component
from pvi.nn.mlp import MLP, Shape, as_shape, flat


class JointMLP(Component):
    """An `MLP` of several inputs, flattened and put side by side; their batches broadcast.

    `(*batch, *inputs[0])`, `(*batch, *inputs[1])`, ... to `(*batch, n)`.

    Args:
        inputs: the shape of each.
        outputs, hidden, activation: as of `MLP`.
    """

    def __init__(
        self,
        inputs: Sequence[Shape],
        outputs: int,
        hidden: Sequence[int] = (256, 256),
        activation: str = "silu",
    ):
        super().__init__()
        self.inputs = tuple(as_shape(shape) for shape in inputs)
        self.outputs, self.hidden, self.activation = outputs, tuple(hidden), activation
        width = sum(torch.Size(shape).numel() for shape in self.inputs)
        self.network = MLP(width, outputs, hidden, activation)

    def forward(self, *inputs: Tensor) -> Tensor:
        parts = [flat(x, shape) for x, shape in zip(inputs, self.inputs, strict=True)]
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in parts))
        return self.network(torch.cat([x.expand(*batch, x.shape[-1]) for x in parts], -1))
