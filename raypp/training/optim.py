"""Optimizers, learning-rate schedules and precision."""

from __future__ import annotations

from typing import Any

import torch

from raypp.config.schema import Constant, MultiStep, OptimizationConfig, Optimizer
from raypp.training.muon import Muon


def learning_rate(train: OptimizationConfig, epochs: int, progress: float) -> float:
    """The learning rate after ``progress`` of ``epochs``; ``progress`` includes the fraction of the current epoch.

    A phase whose length is not ``train.epochs`` stretches the schedule to its own length.
    """
    schedule, peak = train.schedule, train.optimizer.lr
    if isinstance(schedule, Constant):
        return peak
    if isinstance(schedule, MultiStep):
        return peak * schedule.gamma ** sum(progress * train.epochs >= m * epochs for m in schedule.milestones)
    done = min(progress / epochs, 1.0)
    if done < schedule.warmup:
        return peak * done / schedule.warmup
    return peak * (schedule.final + (1 - schedule.final) * (1 - done) / (1 - schedule.warmup))


def build_optimizer(options: Optimizer, parameters: list[Any]) -> torch.optim.Optimizer:
    lr, momentum, weight_decay = options.lr, options.momentum, options.weight_decay
    if options.name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay)
    if options.name == "muon":
        return Muon(parameters, lr, momentum, weight_decay)
    return torch.optim.AdamW(parameters, lr, betas=(momentum, 0.999), weight_decay=weight_decay)


def autocast(train: OptimizationConfig, device: torch.device) -> torch.autocast:
    """A context for the forward pass; precision "auto" is bf16 where the hardware supports it, else float32."""
    enabled = train.precision == "bf16" or (train.precision == "auto" and bf16_is_fast(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 speeds up convolutions: on GPUs since Ampere, and on CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def configure_torch(train: OptimizationConfig) -> None:
    """Set the determinism of this process."""
    torch.use_deterministic_algorithms(train.deterministic, warn_only=True)
    # This debugging aid of deterministic mode writes every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not train.deterministic
