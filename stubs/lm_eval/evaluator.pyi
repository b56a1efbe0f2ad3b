from collections.abc import Callable
from typing import Any

evaluate: Callable[..., dict[str, Any] | None]

def simple_evaluate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any] | None: ...
