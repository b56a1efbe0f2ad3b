"""`sdar_lm_eval generate`: in a terminal, piped, interrupted, with other engines; and its mistakes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from typing import Any

import lmdeploy_standin
import pytest
from rich.console import Console
from support import environment

from sdar_lm_eval import Answer, load
from sdar_lm_eval.commands import generate as command
from sdar_lm_eval.commands import main
from sdar_lm_eval.demo import PROMPT, problems
from sdar_lm_eval.engines.types import BlockStep
from sdar_lm_eval.report.streaming import PlainText, Screen
from sdar_lm_eval.thinking import Thinking

pytestmark = pytest.mark.slow
QUESTION = PROMPT.format(question=problems()[0]["question"])
DEMO = ("--model_args", "pretrained=demo")
STATIC = ("--gen_kwargs", "strategy=static")


@pytest.fixture(scope="module")
def answer() -> Answer:
    with load("demo") as model:
        return model.generate(QUESTION, remasking_strategy="low_confidence_static")


def step(start: int, tokens: list[int], confidences: list[float] | None = None, **how: Any) -> BlockStep:
    at = tuple(-1 if token == 99 else 0 for token in tokens)
    how = {"decided": 99 not in tokens, "finished": False, **how}
    return BlockStep(0, start, tuple(tokens), at, tuple(confidences or [1.0] * len(tokens)), **how)


# Piped


def test_piped_it_is_the_text_alone(answer: Answer, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", QUESTION, *DEMO, *STATIC]) == 0
    out, err = capfd.readouterr()
    assert out == answer.text + "\n"
    tokens, forwards = len(answer.denoising.token_ids), answer.forwards
    assert f"{tokens} tokens in {forwards} forwards" in err and f"{tokens / forwards:.2f} tokens per forward" in err


def test_piped_a_short_max_length_leaves_room_for_what_is_asked(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--model_args", "pretrained=demo,max_length=64", "--gen_kwargs", "max_gen_toks=4"]
    assert main(["generate", "a", *words]) == 0
    assert "tokens in" in capfd.readouterr().err


def test_piped_text_comes_as_blocks_are_decided(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Out())
    assert main(["generate", QUESTION, *DEMO, *STATIC]) == 0
    assert "".join(pieces) == answer.text + "\n"
    written = [piece for piece in pieces if piece]
    texts = answer.denoising.texts
    assert written[:3] == ["".join(texts[block.start : block.stop]) for block in answer.denoising.blocks[:3]]


@pytest.mark.parametrize(("limit", "remedy"), [(2, " Raise max_gen_toks, or set max_thinking_toks."), (64, "")])
def test_a_larger_limit_is_advised_only_where_the_limit_ended_the_thought(
    limit: int, remedy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_args", "pretrained=demo,answer_prefix=<think>", "--gen_kwargs", f"max_gen_toks={limit}"]
    assert main(["generate", "Mia has 3 books. Tom has 4 more.", *words]) == 0
    assert capfd.readouterr().err.endswith(f"The answer ended while the model was thinking.{remedy}\n")


def test_a_prompt_from_standard_input(answer: Answer, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    assert main(["generate", "-", *DEMO, *STATIC]) == 0
    assert capfd.readouterr().out == answer.text + "\n"


def test_json_has_the_settings_and_the_denoising(answer: Answer, capfd: pytest.CaptureFixture[str]) -> None:
    system = ["--system", "Count well.", "--json"]
    assert main(["generate", QUESTION, "--model", "sdar", *DEMO, *STATIC, "max_gen_toks=16", *system]) == 0
    found = json.loads(capfd.readouterr().out)
    assert "Count well." in found["prompt"] and found["settings"]["remasking_strategy"] == "low_confidence_static"
    how = found["denoising"]
    assert len(how["token_ids"]) == len(how["steps"]) == len(how["confidences"]) == 16
    assert found["text"] == "".join(how["texts"]) and found["finish_reason"] == "length"
    assert found["engine"]["engine"] == "native" and found["settings"]["max_gen_toks"] == 16


LETTERS = dict(enumerate("abcde ST\n"))


def test_what_may_begin_the_end_is_held_back() -> None:
    out = io.StringIO()
    plain = PlainText(out, lambda ids: "".join(LETTERS[i] for i in ids), ["STe", "\n\n"])
    told = []
    for start, tokens in ((0, [0, 1]), (2, [2, 6]), (4, [7, 0]), (6, [8, 6]), (8, [7, 4])):
        plain.watch(step(start, [tokens[0], 99]))  # nothing is decided
        plain.watch(step(start, tokens))
        told.append(out.getvalue())
    assert told == ["ab", "abc", "abcSTa", "abcSTa\n", "abcSTa\n"]
    plain.finish("abcSTa\n")
    assert out.getvalue() == "abcSTa\n"


def test_a_thought_is_not_written() -> None:
    """Not even its beginning, while it may still be one; of what follows it, not the white space."""
    thinking, thought = Thinking("</a>", (9,), "<a>"), ["\n", "<a>", "ab", "</a>", "\n", "c", "d"]
    for tokens, expected in ((range(7), ["", "", "", "", "", "c", "cd"]), ([5, 6, 1], ["c", "cd", "cd<a>"])):
        out = io.StringIO()
        plain = PlainText(out, lambda ids: "".join(thought[i] for i in ids), [], thinking)
        told = []
        for start, token in enumerate(tokens):
            plain.watch(step(start, [token]))
            told.append(out.getvalue())
        assert told == expected


def test_a_long_thought_is_not_read_again_at_each_block() -> None:
    """Of a think end of several tokens, which two blocks hold, the block's tokens and those just before are read."""
    thinking, pieces = Thinking("</a>", (), "<a>", opened=True), ["x", "</", "a>", "y"]
    read: list[int] = []

    def decode(ids: Any) -> str:
        read.append(len(ids))
        return "".join(pieces[i] for i in ids)

    out = io.StringIO()
    plain = PlainText(out, decode, [], thinking)
    for start in range(0, 2000, 4):
        plain.watch(step(start, [0, 0, 0, 1 if start == 1996 else 0]))
    assert max(read) == 8 and not out.getvalue()
    plain.watch(step(2000, [2, 3]))
    assert out.getvalue() == "y"


def test_half_a_character_is_held_back() -> None:
    out = io.StringIO()
    plain = PlainText(out, lambda ids: bytes(ids).decode(errors="replace"), [])
    first, second = "é".encode()
    plain.watch(step(0, [97, first]))
    assert out.getvalue() == "a"
    plain.watch(step(2, [second, 98]))
    assert out.getvalue() == "aéb"


# In a terminal


def screen(width: int = 40) -> tuple[Screen, Console]:
    def pieces(ids: Any) -> list[str]:
        texts, begun = [], b""
        for i, token in enumerate(ids):
            begun += b"#" if token == 199 else bytes([token])
            text = begun.decode(errors="replace")
            unfinished = text.endswith("\ufffd") and i < len(ids) - 1
            texts.append("" if unfinished else text)
            begun = begun if unfinished else b""
        return texts

    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    return Screen(console, pieces, mask_token_id=99), console


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def last_frame(console: Console) -> list[str]:
    """The lines that a terminal shows in the end, without colours."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)", written(console)):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif found := re.fullmatch(r"\x1b\[(\d*)A", part):
            row -= int(found[1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part and not part.startswith("\x1b") and part != "\r":
            lines[row] += part
    return [line.rstrip() for line in lines]


def test_masks_become_tokens_coloured_by_confidence() -> None:
    shown, console = screen()
    with shown:
        shown.watch(step(0, [97, 99], [0.3, 1]))
        shown._live.refresh()
        assert "\x1b[1;31ma\x1b[0m\x1b[2m▢\x1b[0m" in written(console)
        shown.watch(step(0, [97, 98], [0.3, 0.995]))
        shown.watch(step(2, [99, 100], [1, 0.8]))
        shown._live.refresh()
        assert "\x1b[1;31ma\x1b[0mb\x1b[2m│\x1b[0m\x1b[2m▢\x1b[0m\x1b[33md\x1b[0m" in written(console)
        shown.watch(step(2, [99 + 1, 100], [0.95, 0.8], finished=True))
    assert last_frame(console)[0] == "ab│dd"
    assert shown.tokens == 4


def test_lines_scroll_and_long_ones_wrap() -> None:
    shown, console = screen(width=10)
    text = "one two three four\n\nfive six seven"
    with shown:
        for start in range(0, len(text), 3):
            block = [*text[start : start + 3].encode()]
            shown.watch(step(start, [*block[:-1], 99]))
            shown.watch(step(start, block, finished=start + 3 >= len(text)))
    lines = last_frame(console)
    assert max(map(len, lines)) <= 10 and "" in lines
    assert "".join(lines).replace("│", "").replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_a_character_of_two_blocks_is_shown_once() -> None:
    shown, console = screen()
    first, second = "é".encode()
    with shown:
        shown.watch(step(0, [97, first]))
        shown._live.refresh()
        assert last_frame(console)[0] == "a"
        shown.watch(step(2, [second, 98], finished=True))
    assert last_frame(console)[0] == "a│éb"


def test_escape_sequences_of_an_answer_are_shown() -> None:
    shown, console = screen()
    with shown:
        shown.watch(step(0, [97, *b"\x1b[2J"], finished=True))
    assert last_frame(console)[0] == "a␛[2J"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, text in ((Terminal(), "a␛[2J"), (io.StringIO(), "a\x1b[2J")):  # a file gets the answer as it is
        plain = PlainText(out, lambda ids: bytes(ids).decode(), [])
        plain.watch(step(0, [97, *b"\x1b[2J"]))
        assert out.getvalue() == text


def terminal(*words: str, send_after: str = "", keys: bytes = b"") -> tuple[str, int]:
    """What `sdar_lm_eval generate` writes in a pseudo-terminal, and its exit code; `keys` are sent after a text."""

    def of_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, such as this one, ignore it

    master, slave = pty.openpty()
    variables = environment() | {"TERM": "xterm", "COLUMNS": "60", "LINES": "20"}
    variables.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "sdar_lm_eval", "generate", *words],
        stdin=slave, stdout=slave, stderr=slave, env=variables, start_new_session=True,
        preexec_fn=of_terminal,
    )  # fmt: skip
    os.close(slave)
    seen, deadline = b"", time.monotonic() + 60
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while time.monotonic() < deadline:
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 65536)
            if keys and send_after.encode() in seen:
                os.write(master, keys)
                keys = b""
    os.close(master)
    return seen.decode(), process.wait(timeout=10)


def test_in_a_terminal(answer: Answer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Console", lambda **how: Console(force_terminal=True, width=60, **how))
    monkeypatch.setenv("TERM", "xterm")
    assert main(["generate", QUESTION, *DEMO, *STATIC, "--delay", "0.01"]) == 0
    out = capfd.readouterr().out
    assert "▢" in out and "│" in out and "\x1b[?25l" in out
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert answer.text.splitlines()[-1] in plain.replace("│", "")
    assert f"{len(answer.denoising.token_ids)} tokens in {answer.forwards} forwards" in " ".join(plain.split())


def test_ctrl_c_leaves_the_text_so_far() -> None:
    out, code = terminal(QUESTION, *DEMO, *STATIC, "--delay", "0.1", send_after="│", keys=b"\x03")
    assert code == 130
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    found = re.search(r"(\S[^\r\n]*│[^\r\n]*)\r\n\s*interrupted after (\d+) tokens", plain)
    assert found is not None and int(found[2]) > 0
    assert "Traceback" not in plain and plain.rstrip().endswith("sdar_lm_eval: interrupted")


# Other engines


@pytest.mark.parametrize("on_screen", [False, True])
def test_an_engine_without_steps_answers_at_once(
    answer: Answer, on_screen: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_screen:
        monkeypatch.setattr(command, "Console", lambda **how: Console(force_terminal=True, width=100, **how))
        monkeypatch.setenv("TERM", "xterm")
    with lmdeploy_standin.standin():
        assert main(["generate", QUESTION, "--engine", "lmdeploy", *DEMO, *STATIC]) == 0
    out, err = capfd.readouterr()
    assert "The lmdeploy engine shows no denoising steps" in (out if on_screen else err)
    assert answer.text in out if on_screen else out == answer.text + "\n"


# Mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["", *DEMO], "the prompt is empty"),
        (["a", "--model_args", "demo"], "--model_args demo: cannot be read (a part has no =). Give name=value"),
        (["a", "--model_args", "{pretrained"], "--model_args {pretrained: cannot be read ("),
        (["a", "--model_args", "pretrained=demo,kernel=1"], "'kernel' is unknown. Did you mean 'kernels'"),
        (["a", *DEMO, "--gen_kwargs", "seed=3"], "The seed is the model's"),
        (["a", *DEMO, "--gen_kwargs", "watch=3"], "gen_kwargs: 'watch' is unknown"),
        (["a", *DEMO, "--gen_kwargs", "steps=9"], "denoising_steps=9"),
        (["a\udcff", *DEMO], "is no Unicode text"),
        (["a", *DEMO, "--system", "b\udcff"], "is no Unicode text"),
        (["a", *DEMO, "--gen_kwargs", "until=b\udcff"], "is no Unicode text"),
        (["a", "--model_args", "pretrained=no/such", "chat_template=off"], "no/such"),
        (["a", "--model_args", "pretrained=demo,chat_template=off", "--system", "b"], "chat_template=off"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(words: list[str], told: str, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["generate", *words]) == 1
    out, err = capfd.readouterr()
    assert not out and told in err
    assert err.splitlines()[-1].startswith("sdar_lm_eval: error: ")


def test_json_settings_are_read_too(capfd: pytest.CaptureFixture[str]) -> None:
    given = '{"max_gen_toks": 64, "until": ["\\n"]}'
    assert main(["generate", QUESTION, *DEMO, "--gen_kwargs", given, "strategy=static"]) == 0
    assert capfd.readouterr().out.count("\n") == 1
