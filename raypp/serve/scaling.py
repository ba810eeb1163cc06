"""Autoscaling of the classifier by the images that wait.

Serve's controller calls the policy. This file imports nothing of raypp, so the policy also works on clusters on which
only the application's runtime environment holds raypp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

WAITING_IMAGES, MAX_WAITING, BUSY = "waiting_images", "max_waiting", "busy"
"""Statistics that each replica reports: images that wait or are computed, their limit, and the busy share of its
inference thread."""
TARGET_SHARE = 0.25  # of the limit: the rest takes the images that arrive while another replica starts
MAX_BUSY = 0.7  # share of the time that the remaining replicas may compute after one stops


def scale_by_images(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Number of replicas for the waiting images, as a policy of Serve's ``autoscaling_config``.

    Replicas start if more than ``TARGET_SHARE`` of ``max_waiting`` images wait in each, or more than
    ``target_ongoing_requests`` requests. Replicas stop if the remaining ones stay below both and compute at most
    ``MAX_BUSY`` of the time. Serve applies the delays, ``min_replicas`` and ``max_replicas``.

    Args:
        context: Serve's view of the deployment; its metrics are means over ``look_back_period_s``.

    Returns:
        the number of replicas, which Serve rounds up, and the policy's state, which is empty.
    """
    current = context.current_num_replicas
    if current == 0:
        return context.target_num_replicas, {}
    statistics = context.aggregated_metrics or {}
    limits = statistics.get(MAX_WAITING, {})
    shares = [images / limits[replica] for replica, images in statistics.get(WAITING_IMAGES, {}).items()]
    by_images = sum(shares) / TARGET_SHARE
    by_requests = context.total_num_requests / context.config.target_ongoing_requests
    by_work = min(current, sum(statistics.get(BUSY, {}).values()) / MAX_BUSY)  # never a reason to start a replica
    return max(by_images, by_requests, by_work), {}
