"""Answers a prompt, and shows in a terminal how the answer is denoised, block by block.

In a terminal, masks (▢) become tokens, which are coloured by confidence; a thought is shown too. Elsewhere, standard
output gets the answer's text alone, without its thought; --json has both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sdar_lm_eval.commands.given import add_engine, add_pairs, engine_of, pairs
from sdar_lm_eval.defaults import DEFAULT_CHECKPOINT
from sdar_lm_eval.errors import UserError

if TYPE_CHECKING:
    from sdar_lm_eval.engines.types import BlockStep, Watch
    from sdar_lm_eval.loaded import Answer, LoadedModel, Prompt

EXAMPLE = 'sdar_lm_eval generate "Reverse: Tom Ada Leo" --model_args pretrained=demo --gen_kwargs strategy=static'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("prompt", help="the prompt, sent as a user's turn; - reads the prompt from standard input")
    add_engine(parser)
    add_pairs(parser, "--gen_kwargs", "as lm_eval's: strategy, threshold, steps, temperature, max_gen_toks, until, …")
    parser.add_argument("--system", metavar="TEXT", help="a system turn before the prompt")
    parser.add_argument(
        "--delay",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="in a terminal, wait this long after each denoising step; default: 0",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: text, tokens, steps, confidences, settings")


def run(arguments: argparse.Namespace) -> str | None:
    """Write the answer, and return None; with --json, return the answer as JSON.

    Raises:
        UserError: the prompt, the checkpoint or a setting cannot be used.
        EngineError: the engine cannot run here, or stopped.
    """
    prompt = _prompt(arguments.prompt, arguments.system)
    model_args = pairs("--model_args", arguments.model_args)
    gen_kwargs: dict[str, Any] = pairs("--gen_kwargs", arguments.gen_kwargs)
    console = Console(highlight=False)
    on_screen = console.is_terminal and not console.is_dumb_terminal and not arguments.json
    with console.status("loading the checkpoint") if on_screen else contextlib.nullcontext():
        from sdar_lm_eval.loaded import LoadedModel
        from sdar_lm_eval.settings import check_names

        check_names(gen_kwargs, "gen_kwargs")
        pretrained = str(model_args.pop("pretrained", DEFAULT_CHECKPOINT))
        model = LoadedModel.open(pretrained, engine_of(arguments), model_args)
    with model:
        if arguments.json:
            answer = _answer(model, prompt, gen_kwargs)
            return json.dumps(_as_dict(model, answer), indent=2, ensure_ascii=False)
        if on_screen:
            _show(console, model, prompt, gen_kwargs, arguments.delay)
        else:
            _write(model, prompt, gen_kwargs)
    return None


def _prompt(text: str, system: str | None) -> Prompt:
    """The prompt, as `generate` takes it.

    Raises:
        UserError: the prompt is empty, or standard input is closed or no text.
    """
    if text == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed. Give the prompt as a text.")
        try:
            text = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is no text in UTF-8: {error}. Convert the text to UTF-8.") from error
    if not text:
        raise UserError("the prompt is empty. Give a text, or - to read it from standard input.")
    if system is None:
        return text
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def _show(console: Console, model: LoadedModel, prompt: Prompt, gen_kwargs: dict[str, Any], delay: float) -> None:
    """Show the answer in a terminal as it is written."""
    from rich.text import Text

    from sdar_lm_eval.report.printing import printable
    from sdar_lm_eval.report.streaming import Screen, cost

    with Screen(console, model.pieces, model.checkpoint.mask_token_id) as screen:
        try:
            answer = _answer(model, prompt, gen_kwargs, _slowly(screen.watch, delay))
        except KeyboardInterrupt:
            screen.stop()
            console.print(f"interrupted after {screen.tokens} tokens", style="dim")
            raise
    if not model.shows_steps:
        if answer.thought is not None:
            console.print(Text(printable(answer.thought.text), "dim"), soft_wrap=True)
        console.print(Text(printable(answer.text)), soft_wrap=True)
        console.print(_no_steps(model), style="dim")
    console.print()
    console.print(cost(answer.denoising), style="dim")
    if answer.thought is not None and not answer.thought.ended:
        console.print(_of_unfinished_thought(answer), style="yellow")


def _write(model: LoadedModel, prompt: Prompt, gen_kwargs: dict[str, Any]) -> None:
    """Write the answer's text to standard output, and its tokens, forwards and seconds to standard error."""
    from sdar_lm_eval.report.streaming import PlainText, cost

    until, thinking = model.settings_of(**gen_kwargs).until, model.thinking_behind(prompt, **gen_kwargs)
    plain = PlainText(sys.stdout, model.checkpoint.decode, until, thinking)
    answer = _answer(model, prompt, gen_kwargs, plain.watch)
    plain.finish(answer.text + "\n")
    if not model.shows_steps:
        print(_no_steps(model), file=sys.stderr)
    print(cost(answer.denoising), file=sys.stderr)
    if answer.thought is not None and not answer.thought.ended:
        print(_of_unfinished_thought(answer), file=sys.stderr)


def _of_unfinished_thought(answer: Answer) -> str:
    cut = answer.finish_reason == "length"
    remedy = " Raise max_gen_toks, or set max_thinking_toks." if cut else ""
    return f"The answer ended while the model was thinking.{remedy}"


def _answer(model: LoadedModel, prompt: Prompt, gen_kwargs: dict[str, Any], watch: Watch | None = None) -> Answer:
    ((_, answer),) = model.stream([prompt], watch=watch, **gen_kwargs)
    return answer


def _slowly(watch: Watch, delay: float) -> Watch:
    """Return a watcher that waits after each step."""

    def watch_and_wait(step: BlockStep) -> None:
        watch(step)
        time.sleep(delay)

    return watch_and_wait


def _no_steps(model: LoadedModel) -> str:
    return f"The {model.info.engine} engine shows no denoising steps, so the answer appeared at once."


def _as_dict(model: LoadedModel, answer: Answer) -> dict[str, object]:
    request = answer.request
    return {
        "text": answer.text,
        **({} if answer.thought is None else answer.thought.as_record()),
        "finish_reason": answer.finish_reason,
        "prompt": answer.prompt,
        "pretrained": model.checkpoint.name,
        "engine": model.info.as_dict(),
        "settings": {**request.decoding.as_dict(), "max_gen_toks": request.max_new_tokens, "seed": model.seed},
        "denoising": answer.denoising.as_dict(),
    }
