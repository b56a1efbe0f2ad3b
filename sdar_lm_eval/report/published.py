"""Published scores in the columns of SDAR's tables, each row with its model, source and decoding settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sdar_lm_eval.errors import UserError, did_you_mean

MMLU, GSM8K, MATH500 = "mmlu_sdar", "gsm8k_sdar_paper", "math500_sdar"
HUMANEVAL, MBPP, IFEVAL, MATHBENCH = "humaneval_sdar", "mbpp_sdar", "ifeval_sdar", "mathbench_sdar"
SCI_TASKS = {
    "MMLU-Pro": "mmlu_pro_sdar",
    "AIME 2024": "aime2024_sdar",
    "AIME 2025": "aime2025_sdar",
    "LMB-hard": "livemathbench_hard_sdar",
    "LCB-v5": "livecodebench_v5_sdar",
    "LCB-v6": "livecodebench_v6_sdar",
    "GPQA-diamond": "gpqa_diamond_sdar",
    "ProteinLMBench": "proteinlmbench_sdar_rule",
}
"""Column of SDAR-30B-A3B-Sci's table -> the task with its greedy protocol."""

TRADO_TASKS = {"MATH500": "trado_math500", "GSM8K": "trado_gsm8k", "AIME 2024": "trado_aime24"}
"""Column of dLLM-RL's table -> the task with its protocol for dynamic unmasking."""

SDAR = "arXiv 2510.06303, table 1"
SCI = "JetAstra/SDAR's README, part II"
DLLM_RL = "Gen-Verse/dLLM-RL's README"
DARE = "DARE's README, by OpenCompass"

_OPENCOMPASS = {
    "block_length": 4,
    "denoising_steps": 4,
    "remasking_strategy": "low_confidence_static",
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "max_gen_toks": 4096,
}
"""Decoding of SDAR's runs (JetAstra/SDAR at c2041a8, evaluation/opencompass/configs)."""

_SCI_GREEDY = _OPENCOMPASS | {"max_gen_toks": 32768}
_SCI_SAMPLED = _SCI_GREEDY | {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""Decoding of SDAR-30B-A3B-Sci's runs. Source of the most new tokens: JetAstra/SDAR's issue 10."""

_SAMPLED = {"block_length": 4, "denoising_steps": 4, "temperature": 1.0}
"""Decoding of dLLM-RL's runs without strategy and most new tokens. Source: configs/ of Gen-Verse/dLLM-RL."""
_THINKING = _SAMPLED | {"remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.9}
_DYNAMIC = _THINKING | {"max_gen_toks": 2000}
_STATIC = _SAMPLED | {"remasking_strategy": "low_confidence_static", "max_gen_toks": 2000}


_UNDOCUMENTED = "the source does not document its prompts and scorers"


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Attributes:
        name: the name that `--published` takes.
        source: the paper or repository that has the row.
        scores: task of this package -> score in per cent; without the tasks that the row lacks.
        decoding: the row's decoding settings; empty where they are unknown, or the model is no block-diffusion model.
        caveat: what besides chance and decoding may explain differences from the row; "" where nothing is known.
        foreign: tasks of `scores` that ask or score otherwise than the source did.
    """

    name: str
    source: str
    scores: Mapping[str, float]
    decoding: Mapping[str, object] = field(default_factory=dict)
    caveat: str = ""
    foreign: frozenset[str] = frozenset()


def _of_sdar(name: str, *scores: float | None) -> Published:
    """A row of SDAR's table: MMLU, GSM8K, MATH500, HumanEval, MBPP, IFEval, MathBench."""
    tasks = (MMLU, GSM8K, MATH500, HUMANEVAL, MBPP, IFEVAL, MATHBENCH)
    known = {task: score for task, score in zip(tasks, scores, strict=True) if score is not None}
    return Published(name, SDAR, known, _OPENCOMPASS if name.startswith("SDAR") else {})


def _of_dllm_rl(name: str, math500: float, gsm8k: float, aime2024: float, decoding: Mapping[str, object]) -> Published:
    """A row of dLLM-RL's table, by its own tasks, and by those of SDAR's table with the same questions."""
    protocol = {"static": "_static", "dynamic": "", "Thinking": "_think"}[name.rpartition("-")[2]]
    own = {f"{task}{protocol}": s for task, s in zip(TRADO_TASKS.values(), (math500, gsm8k, aime2024), strict=True)}
    foreign = {MATH500: math500, GSM8K: gsm8k}
    return Published(f"dLLM-RL:{name}", DLLM_RL, own | foreign, decoding, foreign=frozenset(foreign))


def sampled(task: str) -> str:
    """Return the name of the task that asks the same with the sampling protocol."""
    return f"{task}_s"


def _of_sci(name: str, *scores: float, decoding: Mapping[str, object]) -> Published:
    """A row of SDAR-30B-A3B-Sci's table, in the order of `SCI_TASKS`; a row of neither protocol serves both."""
    greedy = dict(zip(SCI_TASKS.values(), scores, strict=True))
    drawn = {sampled(task): score for task, score in greedy.items()}
    own = greedy if name.endswith("-greedy") else drawn if name.endswith("-sampled") else greedy | drawn
    return Published(name, SCI, own, decoding, _UNDOCUMENTED)


PUBLISHED = {
    row.name: row
    for row in (
        _of_sdar("SDAR-1.7B-Chat", 62.9, 80.1, 63.2, 61.6, 61.1, 43.4, 63.6),
        _of_sdar("SDAR-4B-Chat", 74.9, 89.9, 72.8, 72.0, 65.4, 56.6, 74.7),
        _of_sdar("SDAR-8B-Chat", 78.6, 91.3, 78.6, 78.7, 72.0, 61.4, 76.9),
        _of_sdar("SDAR-30B-A3B-Chat", 82.8, 91.4, 77.8, 87.2, 71.6, 60.6, 79.3),
        _of_sdar("Qwen3-1.7B-AR-SFT", 63.8, 81.1, 62.0, 65.9, 61.9, 43.3, 60.5),
        _of_sdar("Qwen3-30B-AR-SFT", 82.2, 92.7, 76.8, 84.8, 75.1, 57.7, 78.4),
        _of_sdar("LLaDA-8B", 65.9, 78.6, None, 47.6, 34.2, 59.9, None),
        _of_sdar("Dream-7B", 69.5, 81.0, None, 55.5, 58.8, 62.5, None),
        _of_dllm_rl("SDAR-4B-Chat-static", 70.2, 90.2, 5.0, _STATIC),
        _of_dllm_rl("SDAR-4B-Chat-dynamic", 67.4, 88.9, 8.2, _DYNAMIC),
        _of_dllm_rl("SDAR-8B-Chat-static", 74.3, 91.1, 11.8, _STATIC),
        _of_dllm_rl("SDAR-8B-Chat-dynamic", 70.7, 90.4, 8.3, _DYNAMIC),
        _of_dllm_rl("TraDo-4B-Instruct-static", 75.6, 91.2, 8.3, _STATIC),
        _of_dllm_rl("TraDo-4B-Instruct-dynamic", 71.8, 90.3, 10.3, _DYNAMIC),
        _of_dllm_rl("TraDo-8B-Instruct-static", 78.5, 92.3, 13.3, _STATIC),
        _of_dllm_rl("TraDo-8B-Instruct-dynamic", 75.5, 91.2, 11.0, _DYNAMIC),
        _of_dllm_rl("TraDo-8B-Thinking", 87.4, 94.2, 35.5, _THINKING),
        _of_sci("SDAR-30B-A3B-Sci-greedy", 78.1, 76.7, 60.0, 60.7, 40.7, 42.3, 66.7, 59.9, decoding=_SCI_GREEDY),
        _of_sci("SDAR-30B-A3B-Sci-sampled", 77.9, 73.4, 59.2, 58.7, 49.1, 51.4, 66.0, 59.6, decoding=_SCI_SAMPLED),
        _of_sci("AR-30B-A3B-Sci", 78.3, 74.9, 60.7, 55.4, 51.5, 46.3, 61.2, 59.5, decoding={}),
        Published(
            "DARE:SDAR-8B-Chat",
            DARE,
            {MMLU: 77.2, GSM8K: 91.4, MATH500: 78.4, HUMANEVAL: 79.9, MBPP: 71.6},
            {},
        ),
    )
}
"""Name of a published row -> the row."""

SIZES = {"1.7B": "SDAR-1.7B-Chat", "4B": "SDAR-4B-Chat", "8B": "SDAR-8B-Chat", "30B-A3B": "SDAR-30B-A3B-Chat"}
"""Short name of a row of SDAR's own table -> its name."""


def published(name: str) -> Published:
    """Return the published row with a name or a short name.

    Raises:
        UserError: no row has this name; the message lists the names.
    """
    found = PUBLISHED.get(SIZES.get(name, name))
    if found is None:
        names = [*SIZES, *PUBLISHED]
        raise UserError(f"--published {name!r} is unknown; choose {', '.join(names)}.{did_you_mean(name, names)}")
    return found


def published_as(model: str) -> list[Published]:
    """Return the rows that are published for a checkpoint, by its name or folder; none where none fits.

    Of other authors' tables, only the rows of their own protocol's tasks.
    """
    if re.search(r"SDAR-30B-A3B-Sci(?![\w-])", model, re.IGNORECASE):
        return [PUBLISHED["SDAR-30B-A3B-Sci-greedy"], PUBLISHED["SDAR-30B-A3B-Sci-sampled"]]
    own = [name for name in SIZES.values() if re.search(rf"{re.escape(name)}(?![\w-])", model, re.IGNORECASE)]
    others = [
        name
        for name in PUBLISHED
        if (match := re.fullmatch(r"dLLM-RL:(.+?)(?:-static|-dynamic)?", name))
        and re.search(rf"{re.escape(match[1])}(?![\w-])", model, re.IGNORECASE)
    ]
    return [PUBLISHED[name] for name in [*own, *others]]
