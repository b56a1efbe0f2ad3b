# lm_eval as this package uses it: it has no py.typed of its own. Read from 0.4.13; 0.4.9 to 0.4.12 agree in these.
from typing import Any

from lm_eval.evaluator import evaluate as evaluate
from lm_eval.evaluator import simple_evaluate as simple_evaluate

__version__: str

def __getattr__(name: str) -> Any: ...
