"""The cores that a process may use."""

from __future__ import annotations

import os


def own_cores() -> int:
    """Return the number of usable cores, divided by the number of processes that a launcher started on this machine.

    On macOS and Windows, all cores of the machine count as usable.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return max(1, usable // processes)
