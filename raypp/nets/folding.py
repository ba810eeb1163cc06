"""Batch normalisation folded into the convolutions before it, for networks that only answer."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(network: nn.Module) -> nn.Module:
    """A copy of a network in evaluation mode whose convolutions do what a batch normalisation behind them did.

    Its outputs are the same but for rounding, some 1e-5 for logits. What ``torch.fx`` cannot trace is only copied.
    """
    own = copy.deepcopy(network).eval().requires_grad_(False)
    try:
        traced = torch.fx.symbolic_trace(own)
    except Exception:  # a forward pass may do anything with what stands for its input
        return own
    modules = dict(traced.named_modules())
    uses = Counter(node.target for node in traced.graph.nodes)
    for node in list(traced.graph.nodes):
        bn = modules[node.target] if node.op == "call_module" else None
        if not isinstance(bn, nn.BatchNorm2d) or bn.running_mean is None:
            continue
        (before,) = node.all_input_nodes
        convolution = modules[before.target] if before.op == "call_module" else None
        if isinstance(convolution, nn.Conv2d) and len(before.users) == 1 and uses[before.target] == 1:
            traced.set_submodule(before.target, fuse_conv_bn_eval(convolution, bn))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
