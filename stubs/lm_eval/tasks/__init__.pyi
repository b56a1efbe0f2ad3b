from collections.abc import Mapping, Sequence
from typing import Any

class TaskManager:
    all_tasks: list[str]
    include_path: str | list[str] | None
    def __init__(
        self,
        verbosity: str | None = None,
        include_path: str | list[str] | None = None,
        include_defaults: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> None: ...

def get_task_dict(task_name_list: Sequence[str], task_manager: TaskManager | None = None) -> dict[Any, Any]: ...
