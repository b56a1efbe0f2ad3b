"""The description of a model in the log, the results file, the trace and stored answers."""

from __future__ import annotations

from collections.abc import Sequence

import sdar_lm_eval
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.decoding import in_words, spelled
from sdar_lm_eval.engines.types import EngineInfo, LikelihoodConfig
from sdar_lm_eval.lm.account import Account, facts_of_evaluation
from sdar_lm_eval.lm.jobs import Jobs
from sdar_lm_eval.lm.thoughts import Thoughts
from sdar_lm_eval.revision import ANSWER_REVISION
from sdar_lm_eval.settings import Generation


def fingerprint_of(engine: str, info: EngineInfo, checkpoint: Checkpoint | None) -> dict[str, str | int | None]:
    """Return all that answers depend on beside what their keys hold (`store.py`); None: without the checkpoint."""
    return {
        "revision": ANSWER_REVISION,
        "engine": engine,
        "engine_version": info.engine_version,
        **({} if checkpoint is None else {"checkpoint": checkpoint.fingerprint}),
        "dtype": info.dtype,
        **({"engine_commit": info.engine_commit} if info.engine_commit else {}),
        **{name: spelled(value) for name, value in info.answer_options.items() if value not in (None, False)},
    }


def settings_of_answers(
    jobs: Jobs, likelihood: LikelihoodConfig, chat_template: str, thoughts: Thoughts
) -> dict[str, object]:
    """Return the settings of a model that answers depend on."""
    return {
        "max_length": jobs.max_length,
        "chat_template": chat_template,
        **({"thinking": dict(thoughts.given)} if thoughts.given else {}),
        "decoding": jobs.default.as_dict(),
        **likelihood.as_dict(),
    }


def facts_of_model(
    checkpoint: Checkpoint,
    jobs: Jobs,
    likelihood: LikelihoodConfig,
    info: EngineInfo,
    *,
    chat_template: str,
    thoughts: Thoughts,
    world_size: int,
    accounts: Sequence[Account],
) -> dict[str, object]:
    """Return what `results["config"]["sdar_lm_eval"]` has.

    Args:
        checkpoint: the model's checkpoint.
        jobs: has max_length and the decoding settings that hold where a task has none.
        likelihood: settings of the log-likelihoods.
        info: the engine's facts.
        chat_template: the setting of that name.
        thoughts: the settings of thoughts.
        world_size: the number of ranks.
        accounts: each rank's account of the last evaluation; on ranks above 0, the rank's own alone.
    """
    return {
        "version": sdar_lm_eval.__version__,
        "answer_revision": ANSWER_REVISION,
        "pretrained": checkpoint.name,
        "revision": checkpoint.revision,
        "checkpoint_fingerprint": checkpoint.fingerprint,
        "mask_token_id": checkpoint.mask_token_id,
        "block_size": checkpoint.block_length,
        "stop_ids": list(checkpoint.stop_ids),
        "seed": accounts[0].seed,
        "ranks": world_size,
        **settings_of_answers(jobs, likelihood, chat_template, thoughts),
        **info.as_dict(),
        **{name: sum(account.of_engine[name] for account in accounts) for name in info.counted},
        **facts_of_evaluation(accounts),
    }


def described(engine: str, info: EngineInfo, checkpoint: Checkpoint, default: Generation) -> str:
    """Return the line that is logged once a model is open."""
    settings = in_words(default.as_dict())
    return (
        f"{checkpoint.name} on the {engine} engine ({info.device}, {info.dtype}, up to "
        f"{info.max_active} sequences at once); unless a task or --gen_kwargs says otherwise: {settings}"
    )
