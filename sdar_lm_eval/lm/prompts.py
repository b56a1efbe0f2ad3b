"""Text to tokens and back: the chat template, special tokens, pairs of context and continuation."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from sdar_lm_eval.chat_template import ChatTemplate
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.errors import UserError

logger = logging.getLogger(__name__)

CHAT_TEMPLATE_MODES = ("auto", "on", "off")
TOKENIZED_TOGETHER = 1000  # prompts: what a tokenizer makes of them takes five times the memory of their tokens
PROCESS = os.getpid()  # a forked one has another
# Replaces the n-th special token of a message's text while rendering: n between two Unicode noncharacters.
MARK = "\ufdd0{}\ufdd1"

Message = dict[str, str]
"""As chat templates take it: `{"role": "user", "content": "…"}`."""


class Prompts:
    """A checkpoint's tokenizer and chat template, as prompts need them.

    Special tokens in a message's text are text: only those that the template writes are tokens.

    Args:
        checkpoint: its tokenizer and template.
        mode: chat_template=auto, on or off.

    Raises:
        UserError: mode is on, and the checkpoint has no chat template; or it has one that cannot be used.
    """

    def __init__(self, checkpoint: Checkpoint, mode: str = "auto") -> None:
        self.tokenizer = checkpoint.tokenizer
        self._name = checkpoint.name
        self.has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if mode == "on" and not self.has_template:
            raise UserError(
                f"chat_template=on, but checkpoint {self._name!r} has no chat template; use chat_template=off."
            )
        self.renders = self.has_template and mode != "off"
        """Whether a generating task's prompt is put into the template where lm_eval did not put it."""
        self._chosen: str | None = None
        self._templates: dict[str | None, ChatTemplate] = {}
        if self.renders:
            self._template()  # which tries it
        self._rendered: dict[bytes, tuple[str, ...]] = {}
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._said_special = False

    def choose(self, name: str | None) -> None:
        """Take the chat template of this name from now on; None: the default one.

        Raises:
            UserError: there is none of that name.
        """
        self._chosen = name
        if name is not None:
            self._template()

    def template_text(self, name: bool | str) -> str | None:
        """The text of the chat template of this name (True: the default one); None where the checkpoint has none.

        Raises:
            UserError: there is none of that name.
        """
        if not self.has_template:
            return None
        return ChatTemplate(self.tokenizer, self._name, name if isinstance(name, str) else None).source

    def _template(self) -> ChatTemplate:
        if self._chosen not in self._templates:
            self._templates[self._chosen] = ChatTemplate(self.tokenizer, self._name, self._chosen)
        return self._templates[self._chosen]

    @property
    def template_hash(self) -> str | None:
        """The first 16 digits of the sha256 of the chat template in use; None where none is."""
        if not self._templates:
            return None
        return hashlib.sha256(self._template().source.encode()).hexdigest()[:16]

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without a generation prompt its last message is left open to be continued.

        Raises:
            UserError: the checkpoint has no chat template, or the template refuses the conversation, fails, or takes
                too long.
        """
        if not self.has_template:
            raise UserError(f"checkpoint {self._name!r} has no chat template; leave out --apply_chat_template.")
        tokens: list[str] = []  # special tokens that the messages' texts hold

        def mark(found: re.Match[str]) -> str:
            tokens.append(found[0])
            return MARK.format(len(tokens) - 1)

        marked = [{**m, "content": self._special.sub(mark, m["content"])} for m in messages]
        text = self._template().render(marked, add_generation_prompt)
        parts = re.split(MARK.format(r"(\d+)"), text)  # text, number, text, number, …, text
        parts[1::2] = [tokens[int(number)] for number in parts[1::2]]
        rendered = "".join(parts)
        self._rendered[_digest(rendered)] = tuple(parts)[1:] and tuple(parts)
        return rendered

    def is_rendered(self, text: str) -> bool:
        """Whether `render` returned this text."""
        return _digest(text) in self._rendered

    def as_user_turn(self, text: str) -> str:
        """A prompt of which only the text is known, in the template."""
        return self.render([{"role": "user", "content": text}])

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Tokenize; by default special tokens are added, unless the text is rendered or begins with the BOS."""
        if parts := self._rendered.get(_digest(text)):
            return self._encode_parts(parts)
        if add_special_tokens is None:
            add_special_tokens = self._wants_special_tokens(text, self.is_rendered(text))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def encode_prompts(self, texts: Sequence[str], rendered: Sequence[bool], alone: bool) -> list[list[int]]:
        """Tokenize prompts together, which is quicker; an empty one becomes [].

        Args:
            texts: the prompts.
            rendered: for each, whether it is in the chat template.
            alone: whether the process has all cores to itself.
        """
        prompts: list[list[int]] = [[] for _ in texts]
        in_parts = {i for i, text in enumerate(texts) if self._rendered.get(_digest(text))}
        if in_parts and not self._said_special:
            self._said_special = True
            logger.warning(
                "%d of %d prompts hold special tokens in their text, such as %r, which are read as text. If the task "
                "writes the chat template itself, use chat_template=off.",
                len(in_parts),
                len(texts),
                self._special.search(self._rendered[_digest(texts[min(in_parts)])][1])[0],  # type: ignore[index]
            )
        for i in in_parts:
            prompts[i] = self._encode_parts(self._rendered[_digest(texts[i])])
        for special in (False, True):
            some = [
                i
                for i, text in enumerate(texts)
                if i not in in_parts and self._wants_special_tokens(text, rendered[i]) == special
            ]
            for begin in range(0, len(some), TOKENIZED_TOGETHER):
                part = some[begin : begin + TOKENIZED_TOGETHER]
                with _parallel_tokenizing(alone=alone):
                    ids_of = self.tokenizer([texts[i] for i in part], add_special_tokens=special)["input_ids"]
                for i, ids in zip(part, ids_of, strict=True):
                    prompts[i] = ids
        return prompts

    def encode_pair(self, context: str, continuation: str, rendered: bool) -> tuple[list[int], list[int]]:
        """Tokens of a context, and those that its continuation adds; none where the continuation is empty.

        Trailing spaces of the context belong to the continuation, as in lm_eval's own models. Where the tokenizer joins
        the two, the joined token counts for the continuation, which the context's own tokens do not hold.
        """
        parts = self._rendered.get(_digest(context)) or (context,)
        *before, last = parts
        stripped = last.rstrip()
        continuation = last[len(stripped) :] + continuation
        known = self._encode_parts((*before, stripped), rendered)
        if not continuation:
            return known, []
        whole = self._encode_parts((*before, stripped + continuation), rendered)
        shared = next((i for i, (a, b) in enumerate(zip(whole, known, strict=False)) if a != b), len(known))
        shared = min(shared, len(whole) - 1)  # a continuation has at least one token
        return whole[:shared], whole[shared:]

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; of tokens that are one character together, the last has it."""
        texts: list[str] = []
        begin = 0
        for end in range(1, len(token_ids) + 1):
            text = self.tokenizer.decode(list(token_ids[begin:end]), clean_up_tokenization_spaces=False)
            unfinished = text.endswith("\ufffd") and end < len(token_ids)
            texts.append("" if unfinished else text)
            begin = begin if unfinished else end
        return texts

    def _encode_parts(self, parts: Sequence[str], rendered: bool = True) -> list[int]:
        """Tokens of a prompt in parts, of which every second is text that looks like a special token."""
        if len(parts) == 1:
            special = self._wants_special_tokens(parts[0], rendered)
            return list(self.tokenizer.encode(parts[0], add_special_tokens=special))
        ids: list[int] = []
        for number, part in enumerate(parts):
            as_text = bool(number % 2)
            ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]
        return ids

    def _wants_special_tokens(self, text: str, rendered: bool) -> bool:
        bos = self.tokenizer.bos_token
        return not rendered and not (bos and text.startswith(bos))  # a template writes the BOS where there is to be one


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@contextlib.contextmanager
def _parallel_tokenizing(*, alone: bool) -> Iterator[None]:
    """Tokenize many texts by all cores, if the process has them to itself; lm_eval switches that off.

    Tokenizers that have run in parallel warn in every process forked afterwards, unless the variable says what to do
    there: it says to do without, once this is over. A forked process always does without, since the threads stay
    behind.
    """
    if not alone or os.getpid() != PROCESS:
        yield
        return
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = before or "false"
