"""Messages about the resources that a run, a search or its tasks wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from raypp.cluster.ray_internals import reserved_resources

CHECK_SECONDS = 2.0  # between two looks at the cluster

Resources = Mapping[str, float]


class ResourceNotice:
    """Warns repeatedly while a part of the work waits for resources or starts.

    Args:
        part: the part that waits, such as "training on 2 workers".
        resources: amounts that it needs, such as ``{"CPU": 2, "GPU": 0}``.
        seconds: between messages; the first comes after half of it.
        is_waiting: whether the part waits; called at most every ``CHECK_SECONDS``.
        warn: shows a message.
    """

    def __init__(
        self,
        part: str,
        resources: Resources,
        seconds: float,
        is_waiting: Callable[[], bool],
        warn: Callable[[str], None],
    ) -> None:
        self.part, self.resources, self.seconds = part, resources, seconds
        self._is_waiting, self._warn = is_waiting, warn
        self._next_check = float("-inf")
        self._waits_since = 0.0
        self._next_message: float | None = None  # None while nothing waits

    def check(self) -> None:
        """Warn if the part has waited long enough since the last message; called a few times a second."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + min(CHECK_SECONDS, self.seconds / 4)
        if not self._is_waiting():
            self._next_message = None
        elif self._next_message is None:
            self._waits_since = now
            self._next_message = now + self.seconds / 2
        elif now >= self._next_message:
            self._next_message = now + self.seconds
            self._warn(self._message(now - self._waits_since))

    def _message(self, seconds: float) -> str:
        total, free = ray.cluster_resources(), ray.available_resources()
        reserved = reserved_resources()
        if any(free.get(kind, 0) + reserved.get(kind, 0) < amount for kind, amount in self.resources.items()):
            return f"{self.part} waits for {describe_resources(self.resources, total, free)}"
        return f"{self.part} has not started after {seconds:.0f} s, although its resources are free or reserved"


def describe_resources(required: Resources, total: Resources, free: Resources) -> str:
    """Resources that are required, in the cluster, and free there."""
    kinds = [kind for kind in ("CPU", "GPU") if required.get(kind)]
    needs = " and ".join(_amount(required[kind], kind) for kind in kinds)
    has = " and ".join(f"{_amount(total.get(kind, 0), kind)} ({free.get(kind, 0):g} free)" for kind in kinds)
    return f"{needs}; the cluster has {has}"


def _amount(number: float, kind: str) -> str:
    return f"{number:g} {kind}" if number == 1 else f"{number:g} {kind}s"


class SubmittedParts:
    """Which submitted parts of the work run, by the reports of their processes.

    Args:
        names: of parts that are submitted already.
    """

    def __init__(self, *names: str) -> None:
        self._places: dict[str, Any] = dict.fromkeys(names)

    def submit(self, name: str) -> None:
        self._places[name] = None

    def start(self, name: str, place: Any) -> None:
        """Record the :func:`current_place` of a part's process; a part that has ended is ignored."""
        if name in self._places:
            self._places[name] = place

    def end(self, name: str) -> None:
        del self._places[name]

    def all_wait(self) -> bool:
        """Whether there are submitted parts and none of them runs."""
        return bool(self._places) and not any(map(_exists, self._places.values()))


def _exists(place: Any) -> bool:
    """Whether a part still runs: its placement group exists or, if it has none, its node is alive."""
    if isinstance(place, PlacementGroup):
        return bool(ray.util.placement_group_table(place).get("state") == "CREATED")
    return any(node["NodeID"] == place and node["Alive"] for node in ray.nodes())


def current_place() -> Any:
    """Placement group of this process, else the identifier of its node."""
    group = ray.util.get_current_placement_group()
    return ray.get_runtime_context().get_node_id() if group is None else group
