"""What the adapters share: engines of others, which run on GPUs only, in half precision, from a checkpoint folder.

gpu_named, half_precision, …    the options that all take
Decodes, check_requests         which requests an engine takes, and how it refuses the others
BareConfig, plain_config        config.json without the checkpoint's code, as the engine is to read it
Draw, grouped, stop_ids_of      requests in the engine's terms
answer_end                      the engine's tokens back
Installed, is_there, …          which version is installed, and what is missing beside it
end_processes, free_memory      giving a GPU back
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import AutoConfig, PretrainedConfig

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.base import DecodingConfig, GenerationRequest, end_of_answer, to_number
from sdar_lm_eval.errors import EngineError, UserError

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (16, 32, 64, 128, 256)

Config = Mapping[str, Any]
"""config.json, parsed."""

Key = TypeVar("Key", bound=Hashable)


class NoAnswerError(Exception):
    """One request has no answer; the engine goes on."""


# Options


def gpu_named(device: str, engine: str) -> torch.device:
    """Turn a device's name into a GPU that is there, with its number; "auto" and "cuda" are the current one.

    Raises:
        UserError: not a device's name, not a GPU, or one that this machine does not have.
    """
    try:
        resolved = torch.device("cuda" if device == "auto" else device)
    except RuntimeError as error:
        raise UserError(f"device={device!r} is unknown; choose cuda, cuda:N or auto.") from error
    if resolved.type != "cuda":
        raise UserError(f"device={device!r}: {engine} runs on a GPU only; choose cuda or cuda:N, or use --model sdar.")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise UserError(f"device={device!r}: this machine has {torch.cuda.device_count()} usable GPU(s).")
    return torch.device("cuda", index)


def to_share(name: str, value: float) -> float:
    """Read a part of something, given as a number or as text.

    Raises:
        UserError: it is not between 0 and 1.
    """
    share = float(to_number(name, value, whole=False))
    if not 0 < share < 1:
        raise UserError(f"{name}={value} must be between 0 and 1.")
    return share


def check_tensor_parallel(size: int) -> None:
    """Refuse more GPUs for a model than this machine has.

    Raises:
        UserError: it has fewer.
    """
    if size > (gpus := torch.cuda.device_count()):
        raise UserError(f"tensor_parallel_size={size}: this machine has {gpus} usable GPU(s).")


def half_precision(dtype: str, checkpoint: Checkpoint, engine: str) -> str:
    """The name of a dtype of `DTYPES`; "auto" is the checkpoint's own where it is one of them, else bfloat16.

    Raises:
        UserError: another dtype.
    """
    dtype = dtype.removeprefix("torch.")
    own = str(checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype"))
    if dtype == "auto":
        return own if own in DTYPES else "bfloat16"
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: {engine} takes {listed(DTYPES)} or auto; for others use --model sdar.")
    return dtype


def world_size() -> int:
    """Processes of a data parallel run; 1 where there is none."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# Refusals


@dataclass(frozen=True)
class Decodes:
    """What an engine does of `DecodingConfig`.

    Attributes:
        engine: as messages name it, with its version where versions differ.
        strategies: remasking strategies that it has.
        block_lengths: that it takes.
        takes: subject and verb of a message that lists these.
        repetition_penalty: why it is given none.
    """

    engine: str
    strategies: Sequence[str]
    block_lengths: Sequence[int]
    takes: str
    repetition_penalty: str

    def check(self, decoding: DecodingConfig) -> None:
        """Refuse what would be decoded by other rules.

        Raises:
            UserError: says what the engine has.
        """
        if decoding.remasking_strategy not in self.strategies:
            raise UserError(
                f"remasking_strategy={decoding.remasking_strategy!r} is not in {self.engine}, which has "
                f"{listed(self.strategies)}. Choose one of these, or use --model sdar."
            )
        if decoding.repetition_penalty != 1:
            raise UserError(
                f"repetition_penalty={decoding.repetition_penalty}: {self.repetition_penalty}. Use --model sdar, or "
                "leave it out."
            )
        if decoding.block_length not in self.block_lengths:
            raise UserError(
                f"block_length={decoding.block_length}: {self.takes} {listed(self.block_lengths)}. Use --model sdar."
            )


def check_requests(requests: Sequence[GenerationRequest], decodes: Decodes, checkpoint: Checkpoint) -> None:
    """Refuse requests that would be answered wrongly, before any of them runs.

    Raises:
        UserError: there is one.
    """
    for decoding in {request.decoding for request in requests}:
        decodes.check(decoding)
    check_lengths(requests, checkpoint.max_length, f"checkpoint {checkpoint.name!r} has")


def check_lengths(requests: Iterable[GenerationRequest], limit: int, who: str) -> None:
    """Refuse requests that have no place; `who` ("checkpoint 'x' has") names whose limit it is.

    Raises:
        UserError: one is too long.
    """
    for request in requests:
        if request.longest > limit:
            raise UserError(
                f"a request of {len(request.prompt_ids):,} prompt and {request.max_new_tokens:,} new tokens needs "
                f"{request.longest:,} places in whole blocks; {who} {limit:,}. Lower max_gen_toks or max_length."
            )


def listed(values: Sequence[object]) -> str:
    """Values as a message has them."""
    return ", ".join(map(str, values))


# The checkpoint as an engine is shown it


class BareConfig(PretrainedConfig):  # type: ignore[misc]
    """config.json with its keys as attributes, and none of the checkpoint's code.

    Adapters subclass it by name, at the top of a module: engines hand the config to processes of theirs, pickled.
    """


def register_configs(*classes: type[BareConfig]) -> None:
    """Have transformers' AutoConfig open the model types of these classes with them."""
    for config_class in classes:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def plain_config(config: Config, *left_out: str) -> dict[str, object]:
    """config.json without these keys, code, dtype and quantization, nor RoPE scaling as one transformers writes it."""
    left_out += ("auto_map", "dtype", "quantization_config", "rope_scaling")
    return {key: value for key, value in config.items() if key not in left_out}


def rope_theta(config: Config) -> float:
    """The rotary base, from where transformers 5 writes it, or 4."""
    own: Config = config.get("rope_parameters") or {}
    base: float = own.get("rope_theta", config.get("rope_theta", 10000.0))
    return base


def check_mask_token(engine: str, taken: int, checkpoint: Checkpoint) -> None:
    """Compare the mask token that an engine took with the checkpoint's.

    Raises:
        EngineError: it is another: answers would be noise.
    """
    if taken != checkpoint.mask_token_id:
        raise EngineError(f"{engine} takes {taken} for the mask token, not {checkpoint.mask_token_id}.")


# Requests, and what comes back


class Draw(NamedTuple):
    """How tokens are drawn.

    Greedy is top_k=1 at temperature 1, so that a confidence is a probability at temperature 1.
    """

    greedy: bool
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def of(cls, decoding: DecodingConfig) -> Draw:
        """The settings that have a say; all greedy ones are alike."""
        if decoding.greedy:
            return cls(True, 1.0, 1, 1.0)
        return cls(False, decoding.temperature, decoding.top_k, decoding.top_p)


def grouped(indices: Iterable[int], key: Callable[[int], Key]) -> dict[Key, list[int]]:
    """Indices by their key; keys and indices are in the order given."""
    groups: dict[Key, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return groups


def stop_ids_of(request: GenerationRequest, checkpoint: Checkpoint) -> frozenset[int]:
    """A request's stop tokens, and the tokens that are a stop string by themselves: an engine can stop at these."""
    ids = set(request.stop_ids)
    for string in request.stop_strings:
        encoded = checkpoint.tokenizer.encode(string, add_special_tokens=False)
        if len(encoded) == 1 and string in checkpoint.decode(encoded):
            ids.add(encoded[0])
    return frozenset(ids)


def answer_end(
    tokens: Sequence[int], request: GenerationRequest, checkpoint: Checkpoint, engine: str
) -> tuple[int, str]:
    """Where the answer ends in the tokens that an engine returned for it: (tokens of the answer, "stop" or "length").

    Raises:
        NoAnswerError: the engine returned too few.
    """
    end, reason = end_of_answer(tokens, request, checkpoint.decode)
    if not reason:
        raise NoAnswerError(
            f"{engine} returned {len(tokens)} of {request.max_new_tokens} tokens, and none that ends the answer."
        )
    return end, reason


# What is installed


@dataclass(frozen=True)
class Installed:
    """An installed package: its version, and its commit where pip knows it."""

    version: str
    commit: str | None


def installed(package: str) -> Installed | None:
    """What pip wrote of a package; None where pip did not install it."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return Installed(distribution.version, origin.get("vcs_info", {}).get("commit_id"))


def is_there(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    return importlib.util.find_spec(module) is not None


def check_nothing_is_missing(model: str, missing: Collection[str], install: str, note: str = "") -> None:
    """Refuse to go on without what an engine needs.

    Raises:
        EngineError: names all that is missing, and how to install it.
    """
    if missing:
        raise EngineError(f"--model {model} lacks {', '.join(missing)}.{note} {install}")


def version_of(package: str) -> str | None:
    """Version of an installed package, or of its module where pip does not know it; None where neither is there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(package.removesuffix("-python").replace("-", "_"))
        return getattr(module, "__version__", None)


# Processes and memory


@contextlib.contextmanager
def processes_started() -> Iterator[list[BaseProcess]]:
    """A list that gets the processes that were started within, also where that ended with an error."""
    others = multiprocessing.active_children()
    started: list[BaseProcess] = []
    try:
        yield started
    finally:
        started += [process for process in multiprocessing.active_children() if process not in others]


def end_processes(processes: Iterable[BaseProcess], patience: float) -> None:
    """Wait so many seconds for processes to end by themselves, then kill them: they hold a GPU's memory."""
    deadline = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def free_memory() -> None:
    """Give a GPU's memory back that nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()
