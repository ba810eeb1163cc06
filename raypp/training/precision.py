"""In which precision networks compute."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from raypp.config import Optimisation


def autocast(train: Optimisation, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A context for the forward pass: bf16 where the hardware computes in it, else float32."""
    wanted = train.precision
    able = bf16_is_fast(device)
    enabled = wanted == "bf16" or (wanted == "auto" and able)
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether convolutions gain from bf16: GPUs from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
