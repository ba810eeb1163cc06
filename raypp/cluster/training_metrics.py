"""Prometheus metrics of a training on Ray, which the metrics endpoint of its node exports with the prefix ``ray_``."""

from __future__ import annotations

from ray.util.metrics import Gauge

from raypp.utils.progress import Row


class TrainingMetrics:
    """Gauges of one training; its process is one of Ray's workers.

    Args:
        run: value of the tag ``run``.
    """

    def __init__(self, run: str) -> None:
        self._tags, keys = {"run": run}, ("run",)
        self._loss = Gauge("raypp_train_loss", "Mean training loss of the current epoch.", keys)
        self._speed = Gauge("raypp_train_images_per_second", "Training images per second, of all workers.", keys)
        self._epoch = Gauge("raypp_train_epoch", "Current epoch of the current phase, from 1.", keys)

    def update(self, info: Row) -> None:
        """Set the gauges; ``info`` is that of a training, see :meth:`raypp.utils.progress.ProgressListener.step`."""
        self._loss.set(info["loss"], self._tags)
        self._speed.set(info["images_per_s"], self._tags)
        self._epoch.set(info["epoch"], self._tags)
