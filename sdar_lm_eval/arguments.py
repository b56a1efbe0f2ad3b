"""The names of the settings that users may give in model_args and gen_kwargs, with the types of the values."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypedDict, TypeVar, get_type_hints

from sdar_lm_eval.decoding import DecodingConfig
from sdar_lm_eval.engines.native.strategies import spellings
from sdar_lm_eval.engines.registry import ENGINES

KEYWORD_ONLY, POSITIONAL_OR_KEYWORD = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD

ChatMode = Literal["auto", "on", "off"]


class DecodingArguments(TypedDict, total=False):
    """Decoding settings, in model_args or in a request's gen_kwargs, which override those in model_args.

    Attributes:
        do_sample: whether tokens are drawn; false is greedy, whatever the temperature.
        max_gen_toks: most new tokens.
        until: stop strings: texts that end the answer.
        All others: see `DecodingConfig`.
    """

    block_length: int
    denoising_steps: int
    remasking_strategy: str
    confidence_threshold: float
    eb_threshold: float
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    do_sample: bool
    max_gen_toks: int
    until: str | list[str]


class OtherSpellings(TypedDict, total=False):
    """The other spellings of decoding settings (`spellings.py`), for type checkers."""

    strategy: str
    threshold: float
    steps: int
    block: int
    block_size: int
    max_new_tokens: int
    max_tokens: int
    max_completion_tokens: int


class ModelArguments(DecodingArguments, total=False):
    """What `--model_args` takes for every engine, beside `pretrained`.

    Attributes:
        revision: branch, tag or commit of a hub id.
        dtype: float32, bfloat16, float16, or auto: float32 on the CPU, the checkpoint's own on a GPU.
        device: cpu, cuda, cuda:N, or auto: a GPU if there is one. `--device cuda:0` is lm_eval's default, so it counts
            as auto.
        max_length: most tokens of prompt and answer; longer prompts lose their beginning. Default: the checkpoint's.
        max_active: most sequences that run at once; default: 32 on the CPU, 256 on a GPU, or as many as fit.
        seed: seed of sampled answers. The random numbers of an answer depend on seed, task, prompt and repeat, not on
            the batch. Default: the third number of lm_eval's `--seed`.
        chat_template: auto, on or off. auto applies the checkpoint's chat template, if there is one, to prompts of
            generating tasks, as `--apply_chat_template` does. on does the same, and is an error without a template.
            Log-likelihoods are of the text without a template, unless `--apply_chat_template` is given.
        think_end_token: the text or token id that ends a thought, as in lm_eval's hf and vllm models; or off.
            Default: auto, which is `</think>` if the tokenizer, the template or answer_prefix has `</think>`. The
            thought is cut before `until`, filters and scoring, and kept beside the samples. `<think>` at the prompt's
            end or the answer's beginning opens a thought. An answer whose thought does not end is scored as "". If no
            thought begins or ends, the whole answer is scored.
        enable_thinking: passed to the chat template, as chat_template_args={"enable_thinking": …}.
        chat_template_args: further values for the chat template, a mapping or JSON.
        answer_prefix: text with which each generated answer begins, after the opening of the assistant's turn:
            `<think>` or `<think>\\n`. `\\n`, `\\t` and `\\\\` in the prefix are a line break, a tab, a backslash. A
            special or added token that the prefix spells is sent as that token. A task's own gen_prefix follows.
        max_thinking_toks: most tokens of a thought. After that many tokens, the think end is inserted, and the answer
            follows. Default: no limit.
        stop_repetition: N:K, such as 50:4, ends an answer whose last N*K tokens repeat with a period of N tokens or
            fewer; the finish reason is `repetition`. Default: no such end. JetEngine does not support stop_repetition.
        trace: file that gets a JSON line for each finished request; each run and rank has its own file.
        record_steps: keep the step and confidence of each token beside lm_eval's samples; default: true.
        verbose: log each example as its answer finishes, with right or wrong if the task has live accuracy.
        answers: folder that keeps finished answers, from which a later run continues; several processes may share the
            folder.
        likelihood: chain (exact) or nelbo (the evidence lower bound); at temperature 1, whatever the decoding settings.
        mc_samples: even number of mask patterns that nelbo draws for a block; default: 256. If a block has no more
            patterns, nelbo is exact.
        batch_size: `--batch_size N` with N > 1 sets max_active. With 1 (lm_eval's default) or auto, the engine
            chooses max_active.
        max_batch_size: sets max_active under `--batch_size auto`.
        trust_remote_code: has no effect: no code of a checkpoint is ever run.
    """

    revision: str
    dtype: str
    device: str
    max_length: int
    max_active: int
    seed: int
    chat_template: ChatMode
    think_end_token: str | int
    enable_thinking: bool
    chat_template_args: Mapping[str, object] | str
    answer_prefix: str
    max_thinking_toks: int
    stop_repetition: str
    trace: str | Path
    record_steps: bool
    verbose: bool
    answers: str | Path
    likelihood: Literal["chain", "nelbo"]
    mc_samples: int
    batch_size: int | str
    max_batch_size: int
    trust_remote_code: bool


class NativeArguments(ModelArguments, total=False):
    """What `--model sdar` takes.

    Attributes:
        kv_pages: size of the KV cache, in pages of 16 tokens; default: what the requests need, as far as memory
            allows.
        kernels: run with Triton kernels and CUDA graphs; default: true on GPUs of compute capability 8.0 or later where
            triton is installed.
        reproducible: whether answers are the same to the bit in any batch, not only up to rounding; needs the kernels.
            Default: false.
        share_prefixes: whether prompts with a common prefix share the prefix's keys and values. Default: true; false
            is for comparison.
    """

    kv_pages: int
    kernels: bool
    reproducible: bool
    share_prefixes: bool


class JetEngineArguments(ModelArguments, total=False):
    """What `--model sdar-jetengine` takes.

    Attributes:
        gpu_memory_utilization: the share of the GPU's memory that JetEngine may fill; default: what the requests need.
        tensor_parallel_size: GPUs that share the weights (JetEngine 0.1.0 only).
        enforce_eager: run without CUDA graphs.
    """

    gpu_memory_utilization: float
    tensor_parallel_size: int
    enforce_eager: bool


class LMDeployArguments(ModelArguments, total=False):
    """What `--model sdar-lmdeploy` takes.

    Attributes:
        tensor_parallel_size: GPUs that share the weights.
        data_parallel_size: number of processes that `accelerate launch` started, each with a copy of the weights.
            Default: the number of processes.
        cache_max_entry_count: LMDeploy fills this share of the memory that the weights leave free with keys and
            values; default: 0.8.
    """

    tensor_parallel_size: int
    data_parallel_size: int
    cache_max_entry_count: float


def arguments_of(engine: str) -> type[object]:
    """Return the TypedDict of an engine's model_args, by the engine's name in the registry."""
    found: type[object] = globals()[ENGINES[engine].arguments]
    return found


Class = TypeVar("Class", bound=type)


def takes(arguments: type[object], pretrained: str) -> Callable[[Class], Class]:
    """Let `help` and IDEs show each argument of an lm_eval model, with its type and what it is for.

    Args:
        arguments: the TypedDict of the class's keyword arguments.
        pretrained: default of the checkpoint.
    """
    types = get_type_hints(arguments)
    described = decoding_descriptions() | descriptions(ModelArguments) | descriptions(arguments)
    options = [inspect.Parameter(name, KEYWORD_ONLY, default=None, annotation=kind) for name, kind in types.items()]
    checkpoint = inspect.Parameter("pretrained", POSITIONAL_OR_KEYWORD, default=pretrained, annotation=str)
    lines = [f"    {name} ({inspect.formatannotation(kind)}): {described[name]}" for name, kind in types.items()]

    def document(of: Class) -> Class:
        of.__signature__ = inspect.Signature([checkpoint, *options])  # type: ignore[attr-defined]
        of.__doc__ = "\n".join([inspect.cleandoc(of.__doc__ or ""), "", "Options:", *lines])
        return of

    return document


def decoding_descriptions() -> dict[str, str]:
    """Name -> description of the decoding settings; that of the strategy lists all strategies."""
    described = descriptions(DecodingConfig) | descriptions(DecodingArguments)
    rule = described["remasking_strategy"].removesuffix(", one of `STRATEGIES`.")
    return described | {"remasking_strategy": f"{rule}: {spellings()}."}


def descriptions(of: type[object]) -> dict[str, str]:
    """Name -> description, in one line, of the arguments or attributes that a class's docstring lists."""
    listed = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", inspect.cleandoc(of.__doc__ or ""), flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in listed}
