"""Text to tokens and back: the chat template, special tokens, pairs of context and continuation."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from sdar_lm_eval.arguments import ChatMode
from sdar_lm_eval.chat_template import ChatTemplate
from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.checks import check_unicode
from sdar_lm_eval.cores import own_cores
from sdar_lm_eval.errors import UserError
from sdar_lm_eval.lm.task_requests import TaskRequests, TemplatedBy
from sdar_lm_eval.lm.thoughts import Thoughts
from sdar_lm_eval.thinking import is_open
from sdar_lm_eval.tokens import BYTES, first_difference

logger = logging.getLogger(__name__)

TOKENIZED_TOGETHER = 1000  # prompts, or pairs; the tokenizer's result takes five times the memory of the token ids
PROCESS = os.getpid()  # a forked process has another id
# Stands for the n-th special token of the messages' texts (`_Marks`): n between two Unicode noncharacters.
MARK = "\ufdd0{}\ufdd1"

TextInParts = tuple[tuple[str, ...], bool]
"""A text's parts (see `Prompts._parts_of`), and whether the text is in the chat template."""

NO_CONTEXT: TextInParts = ((), True)


class Prompts:
    """Makes prompts' tokens by a checkpoint's tokenizer and chat template.

    A special token in a message's text is encoded as plain text; only those that the template writes are special.

    Args:
        checkpoint: has the tokenizer and the template.
        mode: the setting chat_template.
        thoughts: the settings of thoughts, with the answer prefix and values for the chat template; None: the default.

    Raises:
        UserError: mode is on, and the checkpoint has no chat template; or the chat template cannot be used.
    """

    def __init__(self, checkpoint: Checkpoint, mode: ChatMode = "auto", thoughts: Thoughts | None = None) -> None:
        self.tokenizer = checkpoint.tokenizer
        self.thoughts = Thoughts.read({}, checkpoint) if thoughts is None else thoughts
        self._name, self._stop_ids, self._mode = checkpoint.name, checkpoint.stop_ids, mode
        self.has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if mode == "on" and not self.has_template:
            raise UserError(
                f"chat_template=on, but checkpoint {self._name!r} has no chat template; use chat_template=off."
            )
        self.renders = self.has_template and mode != "off"
        """Whether a generating task's prompt goes into the template where lm_eval did not put it there."""
        self._warned: set[tuple[object, ...]] = set()
        self._chosen: str | None = None
        self._templates: dict[str | None, ChatTemplate] = {}
        if self.renders:
            self._template()  # renders a message, so that a broken template is refused now
        self._rendered: dict[bytes, tuple[str, ...]] = {}
        """Hash of a rendered text -> its parts, every second of which spells a special token; () where none does."""
        self._thinking: set[bytes] = set()
        """Hashes of rendered texts that begin the answer with a thought, and go on within the thought."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._texts: dict[tuple[int, ...], str] = {}

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-text token; where it has none, the first token that ends answers."""
        eos = self.tokenizer.eos_token_id
        return int(self._stop_ids[0] if eos is None else eos)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty prompt: the tokenizer's BOS; where it has none, its end of text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def templated_by(self, task: TaskRequests, context: str) -> TemplatedBy | None:
        """Who put a request's context into the chat template: as the task says, or lm_eval by calling `render`."""
        return "lm_eval" if task.templated_by is None and self.is_rendered(context) else task.templated_by

    def warn_of_template(self, task: TaskRequests, *, generates: bool) -> None:
        """Warn once each of prompts that go into the template unasked, and of answers and scores that are in none."""
        if task.templated_by == "sdar_lm_eval":
            self._warn_once(
                "The checkpoint's chat template is applied to prompts, as by --apply_chat_template (chat_template=%s). "
                "chat_template=off leaves prompts as they are.",
                self._mode,
            )
        if generates and not self.has_template and self._mode == "auto":
            self._warn_once(
                "Checkpoint %r has no chat template, so prompts are sent as plain text. "
                "A base model needs a stop string: --gen_kwargs until=….",
                self._name,
            )
        if task.templated_by is None and task.scored and self.renders:
            self._warn_once(
                "Log-likelihoods are computed without the chat template: chat_template=%s is for generated answers. "
                "--apply_chat_template applies the template to all tasks.",
                self._mode,
            )

    def _warn_once(self, message: str, *arguments: object, key: str = "") -> None:
        """Warn once of each message, and of each `key`."""
        if (message, key) not in self._warned:
            self._warned.add((message, key))
            logger.warning(message, *arguments)

    def choose(self, name: str | None) -> None:
        """Use the chat template of this name from now on; None: the default one.

        Raises:
            UserError: the checkpoint has no chat template of that name.
        """
        self._chosen = name
        if name is not None:
            self._template()

    def template_text(self, name: bool | str) -> str | None:
        """The text of the chat template of this name (True: the default one); None where the checkpoint has none.

        Raises:
            UserError: the checkpoint has no chat template of that name.
        """
        if not self.has_template:
            return None
        return ChatTemplate(self.tokenizer, self._name, name if isinstance(name, str) else None).source

    def _template(self) -> ChatTemplate:
        if self._chosen not in self._templates:
            self._templates[self._chosen] = ChatTemplate(
                self.tokenizer, self._name, self._chosen, self.thoughts.template_args
            )
            for name in self._templates[self._chosen].unread:
                self._warn_once(
                    "%s has no effect: the chat template of checkpoint %r does not read it.", name, self._name, key=name
                )
        return self._templates[self._chosen]

    @property
    def template_hash(self) -> str | None:
        """16 hexadecimal digits of the SHA-256 of the template in use; None where none was used.

        The template's values and the answer prefix count too, where the user gave any.
        """
        if not self._templates:
            return None
        content = self._template().source
        if self.thoughts.template_args or self.thoughts.answer_prefix:
            given = [dict(self.thoughts.template_args), self.thoughts.answer_prefix]
            content += json.dumps(given, sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, *, prefixed: bool = True
    ) -> str:
        """Render a conversation; without a generation prompt its last message is left open to be continued.

        The answer prefix follows the assistant's opening, and the last message that is to be continued follows the
        prefix. A last message that opens a thought follows the opening too: a template may put a thought of its own
        before the message, as for a turn that is complete.

        Args:
            messages: the conversation.
            add_generation_prompt: whether the assistant's turn is opened.
            prefixed: whether the answer prefix is put in.

        Raises:
            UserError: the checkpoint has no chat template, or the template refuses the conversation, fails, or takes
                too long.
        """
        if not self.has_template:
            raise UserError(f"checkpoint {self._name!r} has no chat template; leave out --apply_chat_template.")
        prefix, begun = self.thoughts.answer_prefix if prefixed else "", ""
        if not add_generation_prompt and (prefix or messages[-1]["content"].lstrip().startswith(self.thoughts.start)):
            *messages, last = messages
            begun, add_generation_prompt = last["content"], True
        marks = _Marks(self._special)
        marked = [{**message, "content": marks.put(message["content"])} for message in messages]
        opening, rest = _opening(begun, self.thoughts.start)  # the start of a thought stays a special token
        text = self._template().render(marked, add_generation_prompt) + prefix + opening + marks.put(rest)
        parts = marks.parts(text)
        rendered = "".join(parts)
        digest = _digest(rendered)
        self._rendered[digest] = tuple(parts) if len(parts) > 1 else ()
        if is_open(prefix + begun, self.thoughts.start, self.thoughts.end):
            self._thinking.add(digest)
        return rendered

    def opens_thought(self, prompt: str) -> bool:
        """Whether a prompt ends inside a thought: in the thought's start, or in the given beginning of an answer."""
        return prompt.rstrip().endswith(self.thoughts.start) or _digest(prompt) in self._thinking

    def is_rendered(self, text: str) -> bool:
        """Whether `render` returned this text."""
        return _digest(text) in self._rendered

    def as_user_turn(self, text: str) -> str:
        """Render a text as a conversation of one user turn."""
        return self.render([{"role": "user", "content": text}])

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Tokenize; by default special tokens are added, unless the text is rendered or begins with the BOS."""
        if len(parts := self._parts_of(text)) > 1:
            return self._encode_parts(parts)
        if add_special_tokens is None:
            add_special_tokens = self._wants_special_tokens(text, self.is_rendered(text))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def encode_prompts(self, texts: Sequence[str], rendered: Sequence[bool]) -> list[list[int]]:
        """Tokenize prompts together, which is faster than one by one; an empty prompt becomes [].

        Args:
            texts: the prompts.
            rendered: whether each prompt is in the chat template.
        """
        parts_of = [self._parts_of(text) for text in texts]
        if special_tokens := [parts[1] for parts in parts_of if len(parts) > 1]:
            self._warn_once(
                "%d of %d prompts hold special tokens in their text, such as %r, which are read as text. If the task "
                "writes the chat template itself, use chat_template=off.",
                len(special_tokens),
                len(texts),
                special_tokens[0],
            )
        return self._encode_together(list(zip(parts_of, rendered, strict=True)))

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], rendered: Sequence[bool]
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Yield the tokens of each context, and the tokens that its continuation adds.

        - A continuation has at least one token, unless its text is empty.
        - Trailing spaces of the context belong to the continuation, as in lm_eval's own models.
        - A token that spans both texts counts for the continuation.
        - The prefix token stands for a context without tokens.
        - Pairs with the same context, such as the choices of a question, share one tuple of the context's tokens.

        Args:
            pairs: contexts and continuations.
            rendered: whether each context is in the chat template.
        """
        prefix = (self.prefix_token_id,)
        for begin in range(0, len(pairs), TOKENIZED_TOGETHER):
            end = begin + TOKENIZED_TOGETHER
            both = [
                self._context_and_whole(context, continuation, in_template)
                for (context, continuation), in_template in zip(pairs[begin:end], rendered[begin:end], strict=True)
            ]
            distinct = list(dict.fromkeys(itertools.chain.from_iterable(both)))
            ids_of = dict(zip(distinct, map(tuple, self._encode_together(distinct)), strict=True))
            for context_text, whole_text in both:
                context_ids, whole = ids_of[context_text], ids_of[whole_text]
                if context_text == NO_CONTEXT:
                    yield prefix, whole[1:] if whole[:1] == prefix else whole
                elif whole_text == context_text:  # the continuation is empty
                    yield context_ids or prefix, ()
                else:
                    shared = min(first_difference(context_ids, whole), len(whole) - 1)
                    # A slice would be another tuple than that of the other pairs with the same context.
                    kept = context_ids if shared == len(context_ids) else whole[:shared]
                    yield kept or prefix, whole[shared:]

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token. Of several tokens that encode one character, the last one has the character."""
        texts: list[str] = []
        begin = 0
        for end in range(1, len(token_ids) + 1):
            text = self._text_of(tuple(token_ids[begin:end]))
            while text.endswith("\ufffd") and end - begin > BYTES:  # no character: bytes that encode none
                texts[begin] = self._text_of(tuple(token_ids[begin : begin + 1]))
                begin += 1
                text = self._text_of(tuple(token_ids[begin:end]))
            unfinished = text.endswith("\ufffd") and end < len(token_ids)
            texts.append("" if unfinished else text)
            begin = begin if unfinished else end
        return texts

    def _text_of(self, token_ids: tuple[int, ...]) -> str:
        if token_ids not in self._texts:
            self._texts[token_ids] = self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return self._texts[token_ids]

    def _parts_of(self, text: str) -> tuple[str, ...]:
        """The parts of a text. Every second part spells a special token, and is read as plain text.

        Raises:
            UserError: the text is no Unicode text.
        """
        check_unicode("the text", text)
        return self._rendered.get(_digest(text)) or (text,)

    def _context_and_whole(self, context: str, continuation: str, rendered: bool) -> tuple[TextInParts, TextInParts]:
        """The context without trailing spaces, and the context with its continuation.

        Raises:
            UserError: the context or the continuation is no Unicode text.
        """
        check_unicode("the continuation", continuation)
        if not context:  # a rendered text gets no special tokens
            return NO_CONTEXT, (self._parts_of(continuation), True)
        *before, last = self._parts_of(context)
        return ((*before, last.rstrip()), rendered), ((*before, last + continuation), rendered)

    def _encode_together(self, texts: Sequence[TextInParts]) -> list[list[int]]:
        """The tokens of each text."""
        encoded: list[list[int]] = [[] if len(parts) == 1 else self._encode_parts(parts) for parts, _ in texts]
        for special in (False, True):
            some = [
                i
                for i, (parts, rendered) in enumerate(texts)
                if len(parts) == 1 and self._wants_special_tokens(parts[0], rendered) == special
            ]
            for begin in range(0, len(some), TOKENIZED_TOGETHER):
                part = some[begin : begin + TOKENIZED_TOGETHER]
                with _parallel_tokenizing():
                    ids_of = self.tokenizer([texts[i][0][0] for i in part], add_special_tokens=special)["input_ids"]
                for i, ids in zip(part, ids_of, strict=True):
                    encoded[i] = ids
        return encoded

    def _encode_parts(self, parts: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(parts):
            as_plain_text = bool(number % 2)
            ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=as_plain_text)["input_ids"]
        return ids

    def _wants_special_tokens(self, text: str, rendered: bool) -> bool:
        bos = self.tokenizer.bos_token
        return not rendered and not (bos and text.startswith(bos))  # a template writes the BOS itself, if at all


class _Marks:
    """Stands marks for the special tokens in messages' texts, so that they are told from those that a template writes.

    Args:
        special: matches a special token.
    """

    def __init__(self, special: re.Pattern[str]) -> None:
        self._special = special
        self._tokens: list[str] = []

    def put(self, text: str) -> str:
        """Return a text with a mark in the place of each special token."""
        return self._special.sub(self._mark, text)

    def parts(self, rendered: str) -> list[str]:
        """Divide a rendered text at its marks: text, special token, text, special token, …, text."""
        parts = re.split(MARK.format(r"(\d+)"), rendered)
        parts[1::2] = [self._tokens[int(number)] for number in parts[1::2]]
        return parts

    def _mark(self, found: re.Match[str]) -> str:
        self._tokens.append(found[0])
        return MARK.format(len(self._tokens) - 1)


def _opening(begun: str, start: str) -> tuple[str, str]:
    """Divide the beginning of an answer: a thought's start with the white space before it, or ""; the rest."""
    before, found, rest = begun.partition(start)
    return (before + found, rest) if found and not before.strip() else ("", begun)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@contextlib.contextmanager
def _parallel_tokenizing() -> Iterator[None]:
    """Let the tokenizer use all cores of this process: lm_eval switches parallel tokenization off.

    Afterwards TOKENIZERS_PARALLELISM is false if nobody had set the variable: without a value, a tokenizer that has run
    in parallel warns in every forked process. A forked process never tokenizes in parallel: fork copies no threads.
    """
    cores = own_cores()
    if cores == 1 or os.getpid() != PROCESS:
        yield
        return
    before = {name: os.environ.get(name) for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")}
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ.setdefault("RAYON_NUM_THREADS", str(cores))  # counts when the tokenizer first runs in parallel
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before["TOKENIZERS_PARALLELISM"] or "false"
        if before["RAYON_NUM_THREADS"] is None:
            del os.environ["RAYON_NUM_THREADS"]
