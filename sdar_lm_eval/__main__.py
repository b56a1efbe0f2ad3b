"""lm_eval's command line with our models and tasks known to it: `python -m sdar_lm_eval run --model sdar …`.

It does what plain `lm_eval` does, also where Python skips `.pth` files (`python -S`, `pip install --target`) and where
SDAR_LM_EVAL_AUTOLOAD=0 keeps `lm_eval` itself as its authors made it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sdar_lm_eval import autoload


def main() -> None:
    """Run `lm_eval` with the arguments in `sys.argv`."""
    autoload.install()
    if Path(sys.argv[0]).name == "__main__.py":
        sys.argv[0] = "python -m sdar_lm_eval"  # what lm_eval 0.4.9 shows as its name in usage messages
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
