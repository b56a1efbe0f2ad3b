"""The command line `sdar_lm_eval`, and `python -m sdar_lm_eval`: lm_eval's commands and this package's commands.

lm_eval's commands know this package's models and tasks, even if Python skips `.pth` files (`python -S`, `pip install
--target`) or SDAR_LM_EVAL_AUTOLOAD=0 leaves plain `lm_eval` unchanged.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sdar_lm_eval import autoload
from sdar_lm_eval.commands import COMMANDS, LM_EVAL_COMMANDS, overview, printed, version
from sdar_lm_eval.commands import main as run_command
from sdar_lm_eval.errors import did_you_mean


def main() -> None:
    """Run the command in `sys.argv`; what is no command of this package is lm_eval's."""
    autoload.install()
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        sys.exit(run_command(words))
    if not words or words[0] in ("-h", "--help"):
        sys.exit(printed(overview))
    if words[0] in ("-V", "--version"):
        sys.exit(printed(version))
    if not words[0].startswith("-") and words[0] not in LM_EVAL_COMMANDS:  # lm_eval would list its own commands only
        known = (*LM_EVAL_COMMANDS, *COMMANDS)
        print(
            f"sdar_lm_eval: error: {words[0]!r} is no command.{did_you_mean(words[0], known)} Commands: "
            f"{', '.join(known)}.",
            file=sys.stderr,
        )
        sys.exit(2)
    if Path(sys.argv[0]).name == "__main__.py":
        sys.argv[0] = "python -m sdar_lm_eval"  # what lm_eval 0.4.9 shows as its name in usage messages
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
