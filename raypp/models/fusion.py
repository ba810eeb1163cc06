"""Batch normalization fused into the convolutions before it, for inference."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-3  # of outputs, relative and absolute; rounding stays below a tenth of it


@torch.no_grad()
def fuse_conv_bn(network: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a network in evaluation mode with batch normalization fused into convolutions.

    A forward pass over a few ``images`` shows which layer follows which. If the outputs of the fused copy differ by
    more than rounding (because another layer also reads a convolution's output, for example), the copy is not fused.
    ``torch.fx`` needs no pass, but its tracing changes ``nn.Module`` for all threads of the process.
    """
    original = copy.deepcopy(network).eval().requires_grad_(False)
    fused = copy.deepcopy(original)
    names = {module: name for name, module in fused.named_modules()}
    for convolution, norm in _consecutive_layers(fused, images):
        fused.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
        fused.set_submodule(names[norm], nn.Identity())
    is_same = torch.allclose(fused(images), original(images), TOLERANCE, TOLERANCE)
    return fused if is_same else original


def _consecutive_layers(network: nn.Module, images: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Return the convolutions whose output a batch normalization reads, each called once in a forward pass."""
    num_calls: Counter[nn.Module] = Counter()
    sources: dict[int, nn.Conv2d] = {}
    outputs: list[Tensor] = []  # references, so that no two outputs share an id
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def record_convolution(module: nn.Conv2d, _: object, output: Tensor) -> None:
        num_calls[module] += 1
        sources[id(output)] = module
        outputs.append(output)

    def record_norm(module: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _: object) -> None:
        num_calls[module] += 1
        if id(inputs[0]) in sources:
            pairs.append((sources[id(inputs[0])], module))

    handles = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(record_convolution))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            handles.append(module.register_forward_hook(record_norm))
    network(images)
    for handle in handles:
        handle.remove()
    return [(convolution, norm) for convolution, norm in pairs if num_calls[convolution] == num_calls[norm] == 1]
