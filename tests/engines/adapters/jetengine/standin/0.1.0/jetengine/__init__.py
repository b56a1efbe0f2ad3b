"""A stand-in for JetEngine 0.1.0 (github.com/Labman42/JetEngine, commit 0ddc55a); see jetengine_shared.py."""

from jetengine.engine.llm_engine import LLM, SamplingParams

__all__ = ["LLM", "SamplingParams"]
