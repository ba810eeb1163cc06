"""Forward passes recorded as one operation, for inference next to other Python threads."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3  # of outputs, relative and absolute
BATCH_SIZES = (1, 2, 5)  # at which a recorded pass must give the module's own outputs


@torch.no_grad()
def trace_forward(module: nn.Module, images: Tensor) -> nn.Module:
    """Record a module's forward pass with TorchScript, so that it takes Python's lock once.

    A module takes the lock for every operation, and waits for it each time while another thread runs Python code.
    ``torch.compile`` would do the same, but needs a C++ compiler at run time. The result is the module itself if
    TorchScript is missing or the recorded pass gives other outputs.

    Args:
        module: in evaluation mode, from a tensor to a tensor, without branches that depend on the batch.
        images: a few inputs (N, ...); fewer than ``max(BATCH_SIZES)`` do not suffice.
    """
    if len(images) < max(BATCH_SIZES):
        return module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; each recorded shape gives a warning
            traced: nn.Module = torch.jit.trace(module, images[: BATCH_SIZES[1]], check_trace=False)
        is_same = all(
            torch.allclose(traced(images[:size]), module(images[:size]), TOLERANCE, TOLERANCE) for size in BATCH_SIZES
        )
    except (RuntimeError, TypeError, AttributeError, IndexError):
        return module
    return traced if is_same else module
