"""A load of full bodies on a classifier that may start a second replica, in a process that is connected to the test
cluster."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from services import NPY, npy

CLIENTS, BODY_IMAGES, MAX_WAITING = 3, 256, 1024
NUM_SMALL = 24  # requests to two replicas, each on a new connection
Outcome = tuple[int, str, str]
"""Status, the images' protection, and the version that answered."""


def serve_full_bodies(
    environment: Mapping[str, str], url: str, repository: Path, images: np.ndarray, protections: list[str],
    results: SimpleQueue[Any],
) -> None:  # fmt: skip
    """Put the set of outcomes of all requests, and that of the requests to two replicas.

    Args:
        url: of the cluster's HTTP proxy.
        images: a full body, uint8 (BODY_IMAGES, H, W, C).
        protections: the requests name them in turn.
    """
    os.environ.update(environment)
    import ray
    from ray import serve

    from raypp.serve.deployments import ClassifierDeployment, DeploymentConfig

    ray.init(log_to_driver=False)
    default = ClassifierDeployment._deployment_config.autoscaling_config
    changes = {"max_replicas": 2, "upscale_delay_s": 0, "look_back_period_s": 2, "metrics_interval_s": 0.5}
    deployment = ClassifierDeployment.options(
        autoscaling_config=default.model_copy(update=changes), ray_actor_options={"num_cpus": 0.1}
    )
    config = DeploymentConfig(bundle=str(repository), max_waiting=MAX_WAITING)
    serve.run(deployment.bind(config), name="images", route_prefix="/images")
    classify = f"{url}/images/classifier/v1/classify"

    def num_running() -> int:
        return serve.status().applications["images"].deployments["Classifier"].replica_states.get("RUNNING", 0)

    try:
        assert num_running() == 1
        outcomes = load_until(classify, npy(images), protections, lambda: num_running() == 2)
        small = [post(httpx, classify, npy(images[:1]), protections[i % 2]) for i in range(NUM_SMALL)]
        results.put((set(outcomes), set(small)))
    finally:
        with contextlib.suppress(Exception):
            serve.delete("images")
        ray.shutdown()


def post(client: Any, url: str, body: bytes, protection: str) -> Outcome:
    answer = client.post(url, content=body, headers=NPY | {"Raypp-Protection": protection}, timeout=60)
    return answer.status_code, protection, answer.headers.get("Raypp-Model", "")


def load_until(url: str, body: bytes, protections: list[str], is_done: Callable[[], bool]) -> list[Outcome]:
    """Keep CLIENTS requests on their way until ``is_done``, for a minute at most."""
    outcomes: list[Outcome] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        with httpx.Client() as client:
            while not stop.is_set():
                number += 1
                outcomes.append(post(client, url, body, protections[number % len(protections)]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while not is_done() and time.monotonic() < end:
        time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    assert time.monotonic() < end, "no second replica has started"
    return outcomes
