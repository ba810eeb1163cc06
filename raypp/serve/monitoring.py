"""Prometheus metrics of a replica. Serve adds its application, deployment and replica as labels."""

from __future__ import annotations

from collections import Counter, deque
from types import ModuleType

from raypp.serve.loaded_model import LoadedModel

EXPORT_SECONDS = 1.0  # between two exports
DURATION_BOUNDARIES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]  # seconds
BATCH_BOUNDARIES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]  # images


class ReplicaMetrics:
    """Counts requests and batches, and exports them together: an export takes longer than a count.

    Args:
        metrics: the module ``ray.serve.metrics``.
    """

    def __init__(self, metrics: ModuleType) -> None:
        by_status, by_route = ("route", "status"), ("route",)
        self._requests = metrics.Counter("raypp_requests_total", "Requests answered.", by_status)
        self._images = metrics.Counter("raypp_images_total", "Images of answered requests.", by_status)
        self._duration = metrics.Histogram(
            "raypp_request_duration_seconds", "Time to answer a request.", DURATION_BOUNDARIES, by_route
        )
        self._batch = metrics.Histogram("raypp_batch_images", "Images of a classifier's batch.", BATCH_BOUNDARIES)
        self._waiting = metrics.Gauge("raypp_waiting_images", "Images that wait for the classifier or are computed.")
        self._bundle = metrics.Gauge("raypp_bundle_info", "1 for the active bundle.", ("bundle", "version"))
        self._bundle_tags: dict[str, str] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._image_counts: Counter[tuple[str, str]] = Counter()
        self._durations: deque[tuple[str, float]] = deque()
        self._batch_sizes: deque[int] = deque()

    def count_request(self, route: str, status: int, num_images: int, seconds: float) -> None:
        key = route, str(status)
        self._counts[key] += 1
        self._image_counts[key] += num_images
        self._durations.append((route, seconds))

    def count_batch(self, num_images: int) -> None:
        """Count a batch; may be called from any thread."""
        self._batch_sizes.append(num_images)

    def export(self, model: LoadedModel, num_waiting: int | None) -> None:
        """Export all counts since the last call; ``num_waiting`` is None for a service without waiting images."""
        for counts, metric in ((self._counts, self._requests), (self._image_counts, self._images)):
            for (route, status), number in counts.items():
                if number:
                    metric.inc(number, {"route": route, "status": status})
            counts.clear()
        while self._durations:
            route, seconds = self._durations.popleft()
            self._duration.observe(seconds, {"route": route})
        while self._batch_sizes:
            self._batch.observe(self._batch_sizes.popleft())
        if num_waiting is not None:
            self._waiting.set(num_waiting)
        self._export_bundle({"bundle": model.name, "version": model.version})

    def _export_bundle(self, tags: dict[str, str]) -> None:
        if self._bundle_tags not in ({}, tags):
            self._bundle.set(0, self._bundle_tags)
        self._bundle_tags = tags
        self._bundle.set(1, tags)
