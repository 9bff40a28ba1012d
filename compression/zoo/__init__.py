"""Networks by name: our own small families, and everything timm and torchvision can build."""

from compression.zoo.depthwise_cnn import DepthwiseCnn
from compression.zoo.gated_cnn import GatedCnn
from compression.zoo.group import Group
from compression.zoo.mixer import Mixer
from compression.zoo.plain_cnn import PlainCnn
from compression.zoo.residual_cnn import ResidualCnn
from compression.zoo.timm_model import TimmModel
from compression.zoo.torchvision_model import TorchvisionModel
from compression.zoo.vision_transformer import VisionTransformer

AnyModel = (
    ResidualCnn | PlainCnn | DepthwiseCnn | VisionTransformer | Mixer | Group | GatedCnn | TimmModel | TorchvisionModel
)

__all__ = [
    "AnyModel",
    "DepthwiseCnn",
    "GatedCnn",
    "Group",
    "Mixer",
    "PlainCnn",
    "ResidualCnn",
    "TimmModel",
    "TorchvisionModel",
    "VisionTransformer",
]
