"""A differentiable JPEG codec, for training on uploads that are re-encoded.

Source: ITU-T T.81 (baseline DCT, the example tables of annex K, scaled with quality as libjpeg does) and JFIF's
YCbCr; rounding has a straight-through gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from raypp.models.layers import straight_through

LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *(99,) * 32,
)  # fmt: skip
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
DCT_BASIS = [
    [math.sqrt((2 if k else 1) / 8) * math.cos((2 * n + 1) * k * math.pi / 16) for n in range(8)] for k in range(8)
]
"""The orthonormal cosine transform of 8 values."""


def jpeg(images: Tensor, quality: int, *, subsample: bool = True) -> Tensor:
    """Encode and decode images N x C x H x W in [0, 1], C = 3 or 1, with this quality (1 to 100).

    Args:
        subsample: halve the resolution of chroma (4:2:0), as most encoders do.
    """
    with torch.autocast(images.device.type, enabled=False):
        pixels = _round(images.float() * 255)
        height, width = pixels.shape[-2:]
        if pixels.shape[1] == 1:
            return _clip(_quantize_dct(pixels, LUMA, quality)) / 255
        ycbcr = torch.einsum("kc,nchw->nkhw", pixels.new_tensor(TO_YCBCR), pixels)
        luma, chroma = _quantize_dct(_round(ycbcr[:, :1]), LUMA, quality), ycbcr[:, 1:] + 128
        if subsample:
            padded = F.pad(chroma, (0, width % 2, 0, height % 2), mode="replicate")
            chroma = _quantize_dct(_round(F.avg_pool2d(padded, 2)), CHROMA, quality)
            chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear")[..., :height, :width]
        else:
            chroma = _quantize_dct(_round(chroma), CHROMA, quality)
        ycbcr = torch.cat((luma, chroma - 128), dim=1)
        return _clip(torch.einsum("ck,nkhw->nchw", pixels.new_tensor(TO_RGB), ycbcr)) / 255


def _quantize_dct(plane: Tensor, table: tuple[int, ...], quality: int) -> Tensor:
    """Quantize the cosine transforms of the 8 x 8 blocks of planes N x C x H x W, values 0 to 255."""
    height, width = plane.shape[-2:]
    padded = F.pad(plane, (0, -width % 8, 0, -height % 8), mode="replicate") - 128
    num, channels, rows, columns = padded.shape
    blocks = padded.view(num, channels, rows // 8, 8, columns // 8, 8).transpose(3, 4)
    basis = plane.new_tensor(DCT_BASIS)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = ((scale * plane.new_tensor(table) + 50) // 100).clamp(1, 255).view(8, 8)
    blocks = basis.t() @ (_round(basis @ blocks @ basis.t() / steps) * steps) @ basis
    plane = blocks.transpose(3, 4).reshape(num, channels, rows, columns)[..., :height, :width]
    return _clip(plane + 128)


def _round(values: Tensor) -> Tensor:
    return straight_through(values, values.round())


def _clip(values: Tensor) -> Tensor:
    return _round(values.clamp(0, 255))
