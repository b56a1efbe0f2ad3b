"""Reports on finished runs: `python -m sdar_lm_eval.report table OUTPUT_DIR …`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sdar_lm_eval.errors import SDARError
from sdar_lm_eval.report import gsm8k_json, table

COMMANDS = (table, gsm8k_json)
"""Modules with `NAME`, `HELP`, `add_arguments(parser)` and `run(arguments) -> str`, which is printed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named in `argv` and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdar_lm_eval.report", description="Reports on finished runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = commands.add_parser(command.NAME, help=command.HELP, description=command.__doc__)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        print(arguments.run(arguments), flush=True)
    except BrokenPipeError:  # the reader, say `head`, ended; Python would flush the rest at exit, and fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SDARError as error:
        print(f"sdar_lm_eval: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
