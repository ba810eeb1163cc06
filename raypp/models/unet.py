"""U-Net as the paper's authors use it: two 3x3 convolutions per level, nearest upsampling, skips, 1x1 head.

Source: Ronneberger, Fischer, Brox 2015, in the batch-normalised form of the authors' released code
(34,527,171 parameters at width 64 and depth 4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(channels_in: int, channels_out: int, smooth: bool) -> list[nn.Module]:
    activation = nn.GELU() if smooth else nn.ReLU(inplace=True)
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), activation]


class UNet(nn.Module):
    """U-Net from N x channels x H x W to logits of the same height and width.

    Any H and W: sides that are no multiple of ``2**depth`` are padded by replication and cropped again.

    Args:
        channels: channels in, and out unless ``channels_out`` says otherwise.
        width: channels of the first level; each of the ``depth`` deeper levels doubles them.
        depth: number of 2x2 max-poolings.
        skips: how many skip connections to keep, counted from the deepest level; ``depth`` keeps all of them,
            ``depth - 1`` drops the one at full resolution, 0 makes a plain encoder-decoder.
        smooth: GELU (Hendrycks, Gimpel 2016) in place of the authors' ReLU.
        encoder: takes the place of the way down, whose skips are 0 then: from padded images to what ``middle`` reads.
        middle: is called with the deepest features and the deepest level's height and width, and gives what goes up
            from there, N x (width * 2**depth) x height x width.
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
        if encoder is not None and (middle is None or skips):
            raise ValueError("an encoder takes the place of the way down: it needs a middle, and skips are 0")
        self.encoder, self.middle = encoder, middle
        self.depth = depth
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            nn.Sequential(*conv_bn(before, after, smooth), *conv_bn(after, after, smooth))
            for before, after in zip([channels, *widths[:-1]], widths, strict=True)
            if encoder is None
        )
        self.up = nn.ModuleDict()
        self.merge = nn.ModuleDict()
        self.skip_levels = frozenset(range(depth - skips, depth))
        for level in reversed(range(depth)):
            merged = widths[level] * (2 if level in self.skip_levels else 1)
            self.up[str(level)] = nn.Sequential(*conv_bn(widths[level + 1], widths[level], smooth))
            self.merge[str(level)] = nn.Sequential(
                *conv_bn(merged, widths[level], smooth), *conv_bn(widths[level], widths[level], smooth)
            )
        self.head = nn.Conv2d(width, channels_out or channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        multiple = 2**self.depth
        pad = (0, -width % multiple, 0, -height % multiple)
        x = F.pad(images, pad, mode="replicate") if any(pad) else images
        deepest = (x.shape[-2] // multiple, x.shape[-1] // multiple)
        kept: list[Tensor] = []
        if self.encoder is not None:
            x = self.encoder(x)
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        if self.middle is not None:
            x = self.middle(x, deepest)
        for level in reversed(range(self.depth)):
            x = self.up[str(level)](F.interpolate(x, scale_factor=2, mode="nearest"))
            if level in self.skip_levels:
                x = torch.cat((kept[level], x), dim=1)
            x = self.merge[str(level)](x)
        logits: Tensor = self.head(x)
        return logits[..., :height, :width]
