"""The attack ladder on a cluster: a task per attack, as many at a time as there are CPUs or GPUs for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from raypp.cluster.spread import Outcome, spread
from raypp.ladder import JUDGE, Plan, load_victim_of, restore, run_attack, train_judge, waits_for
from raypp.progress import GridDisplay, Shows


def run_on_ray(plan: Plan, missing: Sequence[str], display: GridDisplay, ended: Callable[[str, Outcome], None]) -> None:
    """Run attacks; ``ended`` is told of each ``{"result": ...}`` or ``{"error": sentence}``.

    A task whose worker dies is started again and resumes its training from the newest checkpoint.

    Raises:
        ConfigError: no attack fits into the cluster.
    """
    dumped = plan.dump()
    after = {name: waits_for(plan, name) for name in missing if name != JUDGE}
    work = {name: (dumped, name) for name in missing}
    spread(_run, work, plan.suite.cluster, display, ended, what="an attack", after=after)


def _run(dumped: dict[str, Any], name: str, display: Shows) -> dict[str, Any]:
    plan = restore(dumped)
    if name == JUDGE:
        train_judge(plan, load_victim_of(plan), display)
        return {}
    return run_attack(plan, name, display)
