from typing import Any

utils: Any

def __getattr__(name: str) -> Any: ...
