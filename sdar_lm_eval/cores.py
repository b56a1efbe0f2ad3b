"""The cores that a process may use."""

from __future__ import annotations

import os


def own_cores() -> int:
    """Return this process's share of the usable cores. A launcher's other processes on this machine have the rest.

    macOS and Windows tell only how many cores the machine has.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return max(1, usable // processes)
