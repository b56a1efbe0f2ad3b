from abc import ABC
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance

class SqliteDict:  # of the package sqlitedict
    filename: str

class CacheHook:
    dbdict: SqliteDict | None

class LM(ABC):
    cache_hook: CacheHook
    def __init__(self) -> None: ...
    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]: ...
    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]: ...
    def generate_until(self, requests: Sequence[Instance]) -> list[str]: ...
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str: ...
    def chat_template(self, chat_template: bool | str = False) -> str | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def tokenizer_name(self) -> str: ...
    def set_cache_hook(self, cache_hook: CacheHook) -> None: ...
    # What LM sets, and its properties read.
    _rank: int
    _world_size: int

class TemplateLM(LM):
    tokenizer: Any

class CachingLM:
    lm: LM
    def __init__(self, lm: LM, cache_db: str) -> None: ...
