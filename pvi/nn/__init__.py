"""Networks for encoders and decoders; any `nn.Module` of one's own does as well."""

from pvi.nn.component import Component, describe
from pvi.nn.conv import ConvDecoder, ConvEncoder, PatchDiscriminator
from pvi.nn.denoisers import DenoisingMLP, UNet
from pvi.nn.joint import JointMLP
from pvi.nn.made import MADE
from pvi.nn.mlp import MLP, GatedMLP
from pvi.nn.pixelcnn import PixelCNN

__all__ = [
    "MADE",
    "MLP",
    "Component",
    "ConvDecoder",
    "ConvEncoder",
    "DenoisingMLP",
    "GatedMLP",
    "JointMLP",
    "PatchDiscriminator",
    "PixelCNN",
    "UNet",
    "describe",
]
