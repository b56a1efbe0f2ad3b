"""Read by every Python that has this folder on its path when it starts: what takes seconds of a run is left out."""

import os
import sys

if "QUICK_START_SERVER" in os.environ and sys.argv[0] not in ("", "-c"):
    import forks

    forks.become_one(os.environ["QUICK_START_SERVER"])

import quick_lm_eval  # noqa: F401
