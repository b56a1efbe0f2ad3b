"""A stand-in for JetEngine 0.2.0 (github.com/Labman42/JetEngine, commit 11563d1); see jetengine_shared.py."""

from jetengine.engine.llm_engine import LLM, SamplingParams

__all__ = ["LLM", "SamplingParams"]
