"""lm_eval without what takes seconds of a run.

Its own 14,000 task files are not read, ours are; and pip and the system are not asked for versions.
"""

import functools
import sys
import types
from pathlib import Path

import lm_eval.tasks

import sdar_lm_eval

TASKS = str(Path(sdar_lm_eval.__file__).parent / "tasks")

report = types.ModuleType("torch.utils.collect_env")
report.get_pretty_env_info = lambda: ""
sys.modules[report.__name__] = report

init = lm_eval.tasks.TaskManager.__init__


@functools.wraps(init)
def init_without_stock_tasks(self, *arguments, include_path=None, **settings):
    users = list(include_path) if isinstance(include_path, (list, tuple)) else [include_path] if include_path else []
    init(self, *arguments, **(settings | {"include_path": [TASKS, *users], "include_defaults": False}))


lm_eval.tasks.TaskManager.__init__ = init_without_stock_tasks
