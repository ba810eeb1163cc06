"""U-Net as the paper's authors use it: two 3x3 convolutions per level, nearest upsampling, skips, 1x1 head.

Source: Ronneberger, Fischer, Brox 2015, in the batch-normalized form of the authors' released code
(34,527,171 parameters at width 64 and depth 4).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_block(*channels: int, smooth: bool) -> nn.Sequential:
    """Return 3x3 convolutions between these numbers of channels, each with batch normalization and activation."""
    layers: list[nn.Module] = []
    for channels_in, channels_out in itertools.pairwise(channels):
        activation = nn.GELU() if smooth else nn.ReLU(inplace=True)
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), activation]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net from N x channels x H x W to logits of the same height and width.

    Sides are padded by replication to multiples of ``2**depth`` and cropped again.

    Args:
        channels: input channels, and output channels unless ``channels_out`` is set.
        width: channels of the first level; each of the ``depth`` deeper levels doubles them.
        depth: number of 2x2 max-poolings.
        skips: number of skip connections, counted from the deepest level; ``depth`` keeps all, ``depth - 1`` drops the
            one at full resolution, 0 leaves a plain encoder-decoder.
        smooth: GELU (Hendrycks, Gimpel 2016) in place of the authors' ReLU.
        encoder: replaces the contracting path, with 0 skips: maps padded images to the input of ``middle``.
        middle: maps the deepest features to the input of the expanding path, N x (width * 2**depth) x height x width;
            called with the features and the (height, width) of the deepest level.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        depth: int = 4,
        skips: int | None = None,
        channels_out: int | None = None,
        smooth: bool = False,
        encoder: nn.Module | None = None,
        middle: nn.Module | None = None,
    ) -> None:
        super().__init__()
        skips = depth if skips is None else skips
        self.encoder, self.middle = encoder, middle
        self.depth = depth
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            conv_block(channels_in, channels_out, channels_out, smooth=smooth)
            for channels_in, channels_out in itertools.pairwise([channels, *widths])
            if encoder is None
        )
        self.up = nn.ModuleDict()
        self.merge = nn.ModuleDict()
        self.skip_levels = frozenset(range(depth - skips, depth))
        for level in reversed(range(depth)):
            channels_in = widths[level] * (2 if level in self.skip_levels else 1)
            self.up[str(level)] = conv_block(widths[level + 1], widths[level], smooth=smooth)
            self.merge[str(level)] = conv_block(channels_in, widths[level], widths[level], smooth=smooth)
        self.head = nn.Conv2d(width, channels_out or channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        multiple = 2**self.depth
        pad = (0, -width % multiple, 0, -height % multiple)
        x = F.pad(images, pad, mode="replicate") if any(pad) else images
        deepest_size = (x.shape[-2] // multiple, x.shape[-1] // multiple)
        skips: list[Tensor] = []
        if self.encoder is not None:
            x = self.encoder(x)
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        if self.middle is not None:
            x = self.middle(x, deepest_size)
        for level in reversed(range(self.depth)):
            x = self.up[str(level)](F.interpolate(x, scale_factor=2, mode="nearest"))
            if level in self.skip_levels:
                x = torch.cat((skips[level], x), dim=1)
            x = self.merge[str(level)](x)
        logits: Tensor = self.head(x)
        return logits[..., :height, :width]
