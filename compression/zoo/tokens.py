"""Images as sequences of tokens: the front of the transformer and the mixer.

B batch, N tokens, D width.
"""

from typing import Literal

from torch import Tensor, nn

from compression.errors import ShapeError
from compression.zoo.convolution import conv_bn_relu

Stem = Literal["conv", "patch"]


class Tokens(nn.Module):
    """[B,C,H,W] -> [B,N,D].

    ``patch`` is one strided convolution over non-overlapping patches (Dosovitskiy et al. 2020,
    arXiv:2010.11929). ``conv`` halves the image with 3x3 convolutions until a token covers ``patch_size``
    pixels, which trains faster and more evenly (Xiao et al. 2021, arXiv:2106.14881).
    """

    def __init__(
        self, input_shape: tuple[int, int, int], width: int, *, patch_size: int, stem: Stem, stem_width: int
    ) -> None:
        super().__init__()
        channels, height, image_width = input_shape
        if stem == "patch":
            if height % patch_size or image_width % patch_size:
                raise ShapeError(
                    f"Image '{channels}x{height}x{image_width}' has sides that patch_size {patch_size} does "
                    "not divide, expected whole patches. Choose another patch_size, or stem 'conv'."
                )
            layers: list[nn.Module] = [nn.Conv2d(channels, width, patch_size, patch_size)]
        else:
            halvings = patch_size.bit_length() - 1
            layers = []
            for _ in range(halvings):
                layers.append(conv_bn_relu(channels, stem_width, kernel=3, stride=2))
                channels = stem_width
            layers.append(nn.Conv2d(channels, width, 1))
        self.layers = nn.Sequential(*layers)
        self.num_tokens = -(-height // patch_size) * -(-image_width // patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)
