"""What stands in front of an engine: the checkpoint, and what turns prompts into the engine's requests."""

from __future__ import annotations

from dataclasses import dataclass

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.registry import make_engine
from sdar_lm_eval.engines.types import Engine
from sdar_lm_eval.lm.jobs import Jobs
from sdar_lm_eval.lm.likelihoods import Likelihoods
from sdar_lm_eval.lm.prompts import Prompts
from sdar_lm_eval.lm.thoughts import Thoughts
from sdar_lm_eval.settings import ModelSettings


@dataclass(frozen=True)
class Frontend:
    """A checkpoint with a user's settings.

    Attributes:
        settings: the user's settings.
        checkpoint: the opened checkpoint.
        prompts: texts and conversations -> tokens.
        jobs: prompts with settings -> requests for answers.
        likelihoods: texts -> requests for log-likelihoods.
    """

    settings: ModelSettings
    checkpoint: Checkpoint
    prompts: Prompts
    jobs: Jobs
    likelihoods: Likelihoods

    @classmethod
    def open(cls, settings: ModelSettings) -> Frontend:
        """Open the checkpoint that the settings name.

        Args:
            settings: the user's settings.

        Raises:
            UserError: the checkpoint cannot be opened, or a setting does not fit the checkpoint.
        """
        checkpoint = Checkpoint.open(settings.pretrained, settings.revision)
        prompts = Prompts(checkpoint, settings.chat_template, Thoughts.read(settings.thoughts, checkpoint))
        jobs = Jobs(checkpoint, prompts, settings.decoding, settings.max_length)
        jobs.check_limits(answers_limited=settings.limits_length)
        config = settings.likelihood_config(jobs.default.decoding.block_length)
        return cls(settings, checkpoint, prompts, jobs, Likelihoods(checkpoint, prompts, jobs.max_length, config))

    def start(self, engine: str, device: str) -> Engine:
        """Load the checkpoint into an engine of the registry, on a device.

        Raises:
            UserError: the engine cannot run the checkpoint, or refuses a setting.
            EngineError: the engine, or something that the engine needs, is missing.
        """
        settings = self.settings
        return make_engine(
            engine,
            self.checkpoint,
            device=device,
            dtype=settings.dtype,
            max_active=settings.max_active,
            **settings.engine,
        )
