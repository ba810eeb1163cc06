"""The memory that is available to this process."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from raypp.utils.errors import DataError

MEMINFO, CGROUP_ROOT, OWN_CGROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CGROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By cgroup version: the files with the limit and the usage of a container, and the reclaimable part in memory.stat."""


def check_memory(num: int, shape: tuple[int, ...]) -> None:
    """Raise DataError if ``num`` uint8 images of ``shape`` (H, W, C) need over 60 % of the available memory.

    They are in memory twice while they are split and moved.
    """
    available = available_memory()
    if available is None:
        return
    required = 2 * num * math.prod(shape)
    if required > 0.6 * available:
        raise DataError(
            f"{num} images of {' x '.join(map(str, shape))} need {required / 1e9:.1f} GB and 60 % of the available "
            f"memory is {0.6 * available / 1e9:.1f} GB; set data.stream=true or a smaller data.image_size"
        )


def available_memory() -> int | None:
    """Bytes that this process can still allocate, within the limit of its container; None if unknown."""
    if not MEMINFO.exists():
        return None
    fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    available = [int(fields["MemAvailable"].split()[0]) * 1024]
    for folder, version in _cgroups():
        limit, usage, cached = CGROUP_FILES[version]
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", which means no limit
            used = int((folder / usage).read_text()) - _reclaimable_bytes(folder / "memory.stat", cached)
            available.append(int((folder / limit).read_text()) - max(0, used))
    return max(0, min(available))


def _cgroups() -> Iterator[tuple[Path, int]]:
    """Folders and versions of the memory control groups of this process, innermost first."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = ["0::/", "0:memory:/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, version = CGROUP_ROOT, 2
        elif "memory" in controllers.split(","):
            root, version = CGROUP_ROOT / "memory", 1
        else:
            continue
        innermost = root / path.lstrip("/")
        # In a container the path is often that of the host, and only the root exists.
        yield from ((folder, version) for folder in (innermost, *innermost.parents) if folder.is_relative_to(root))


def _reclaimable_bytes(stat: Path, field: str) -> int:
    """Bytes of cached files that are not in use; the kernel frees them before it refuses memory."""
    try:
        fields = dict(line.split() for line in stat.read_text().splitlines())
        return int(fields.get(field, 0))
    except (OSError, ValueError):
        return 0
