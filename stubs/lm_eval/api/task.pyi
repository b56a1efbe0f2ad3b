from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lm_eval.api.instance import Instance

class Task:
    OUTPUT_TYPE: str | None
    config: Any
    @property
    def instances(self) -> list[Instance]: ...
    @property
    def eval_docs(self) -> Any: ...
    # settings: limit, world_size, samples
    def doc_iterator(self, *, rank: int = 0, **settings: object) -> Iterator[tuple[int, dict[str, Any]]]: ...
    def build_all_requests(self, **settings: object) -> None: ...
    def dump_config(self) -> dict[str, Any]: ...
    def apply_filters(self) -> list[Instance] | None: ...
    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> Any: ...

class ConfigurableTask(Task):
    dataset: Any
    def __init__(self, config: Mapping[str, Any] | None = None) -> None: ...
    def fewshot_context(
        self,
        doc: dict[str, Any],
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., str] | None = None,
        gen_prefix: str | None = None,
    ) -> Any: ...
