"""Evaluate SDAR block-diffusion language models with EleutherAI's lm-evaluation-harness.

Importing this package loads neither torch nor lm_eval; the names below load on first use. The import also makes the
package's models and tasks known to lm_eval (see autoload.py).
"""

from __future__ import annotations

from sdar_lm_eval import autoload

__version__ = "0.2.0"

# Importing `typing` would slow down each start of Python, which imports this package (autoload.py).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from sdar_lm_eval.checkpoint import Checkpoint
    from sdar_lm_eval.decoding import DecodingConfig
    from sdar_lm_eval.engines.registry import make_engine
    from sdar_lm_eval.engines.types import Engine, GenerationRequest, GenerationResult
    from sdar_lm_eval.errors import EngineError, SDARError, UserError
    from sdar_lm_eval.lm.model import SDARLM
    from sdar_lm_eval.loaded import Answer, LoadedModel, load
    from sdar_lm_eval.report.frames import compare, read_run

_HOME_OF = {
    "Answer": "sdar_lm_eval.loaded",
    "Checkpoint": "sdar_lm_eval.checkpoint",
    "DecodingConfig": "sdar_lm_eval.decoding",
    "Engine": "sdar_lm_eval.engines.types",
    "EngineError": "sdar_lm_eval.errors",
    "GenerationRequest": "sdar_lm_eval.engines.types",
    "GenerationResult": "sdar_lm_eval.engines.types",
    "LoadedModel": "sdar_lm_eval.loaded",
    "SDARError": "sdar_lm_eval.errors",
    "SDARLM": "sdar_lm_eval.lm.model",
    "UserError": "sdar_lm_eval.errors",
    "compare": "sdar_lm_eval.report.frames",
    "load": "sdar_lm_eval.loaded",
    "make_engine": "sdar_lm_eval.engines.registry",
    "read_run": "sdar_lm_eval.report.frames",
}

__all__ = [  # noqa: RUF022  (types first, then what makes them)
    "Answer",
    "Checkpoint",
    "DecodingConfig",
    "Engine",
    "EngineError",
    "GenerationRequest",
    "GenerationResult",
    "LoadedModel",
    "SDARError",
    "SDARLM",
    "UserError",
    "__version__",
    "compare",
    "load",
    "make_engine",
    "read_run",
]


if not TYPE_CHECKING:  # with __getattr__, type checkers would accept any name

    def __getattr__(name: str) -> object:
        if name in _HOME_OF:
            from importlib import import_module

            return getattr(import_module(_HOME_OF[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


autoload.install_unless_disabled()
