"""Networks for encoders and decoders; any `nn.Module` of one's own does as well."""

from pvi.nn.component import Component, describe
from pvi.nn.conv import ConvDecoder, ConvEncoder, PatchDiscriminator
from pvi.nn.denoisers import DenoisingMLP, UNet
from pvi.nn.joint import JointMLP
from pvi.nn.mlp import MLP, GatedMLP

__all__ = [
    "MLP",
    "Component",
    "ConvDecoder",
    "ConvEncoder",
    "DenoisingMLP",
    "GatedMLP",
    "JointMLP",
    "PatchDiscriminator",
    "UNet",
    "describe",
]
