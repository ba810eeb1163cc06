"""Batch normalisation folded into the convolutions before it, for networks that only answer."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-3  # of outputs, relative and absolute: rounding stays below a tenth of it


@torch.no_grad()
def fuse_conv_bn(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy of a network in evaluation mode whose convolutions do what a batch normalisation behind them did.

    Which is behind which is seen from a pass over ``images``; if the copy then answers them otherwise than the network
    by more than rounding (a convolution's output is also used elsewhere, say), nothing is folded. ``torch.fx`` would
    see it without a pass, but tracing changes ``nn.Module`` for all threads of the process meanwhile.

    Args:
        images: what the network reads, a few of them.
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    own = copy.deepcopy(plain)
    calls: Counter[nn.Module] = Counter()
    made: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # so that no two outputs are one object
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def convolved(module: nn.Module, _: object, output: Tensor) -> None:
        calls[module] += 1
        made[id(output)] = module
        kept.append(output)

    def normalised(module: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        calls[module] += 1
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])], module))

    handles = [
        module.register_forward_hook(convolved if isinstance(module, nn.Conv2d) else normalised)
        for module in own.modules()
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.BatchNorm2d) and module.running_mean is not None)
    ]
    own(images)
    for handle in handles:
        handle.remove()
    names = {module: name for name, module in own.named_modules()}
    for convolution, normalisation in pairs:
        if calls[convolution] == calls[normalisation] == 1:
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(normalisation, nn.BatchNorm2d)
            own.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, normalisation))
            own.set_submodule(names[normalisation], nn.Identity())
    same = torch.allclose(own(images), plain(images), TOLERANCE, TOLERANCE)
    return own if same else plain
