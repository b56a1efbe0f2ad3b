"""A sentence of given words, by a small grammar, so that every right sentence is known."""

from __future__ import annotations

from collections.abc import Mapping

from sdar_lm_eval.tasks.generated.draws import Draws
from sdar_lm_eval.tasks.generated.forms import Sentence
from sdar_lm_eval.tasks.generated.kind import Answer, Case, Form, Kind, Size
from sdar_lm_eval.tasks.generated.waiting_line import DEMO_NAMES

# No word is in two lists, and none belongs to two word classes in a way that would make another sentence.
ADJECTIVES = (
    "ancient", "brave", "careful", "clever", "cheerful", "elegant", "famous", "friendly", "gentle", "hungry", "lonely",
    "nervous", "noisy", "polite", "proud", "quiet", "sleepy", "strange", "tired", "wise",
)  # fmt: skip
NOUNS = (
    "actor", "artist", "baker", "dancer", "dentist", "doctor", "farmer", "gardener", "king", "lawyer", "merchant",
    "musician", "painter", "poet", "sailor", "soldier", "student", "teacher", "tourist", "writer",
)  # fmt: skip
VERBS = (
    "admires", "avoids", "calls", "finds", "follows", "forgets", "greets", "helps", "hugs", "invites", "knows", "meets",
    "remembers", "sees", "teaches", "thanks", "trusts", "visits", "warns", "watches",
)  # fmt: skip

# Words of the checkpoint's word problems.
DEMO_VERBS = ("brings", "gives", "sells", "takes")
DEMO_ITEMS = ("apples", "beads", "books", "buttons", "cards", "coins", "marbles", "pencils", "shells", "stamps")
DEMO_PLACES = ("library", "market", "park", "school", "station")


class WordsToSentence(Kind):
    """A sentence that has each given word once."""

    def draw(self, draws: Draws, size: Size, number: int) -> Case:
        """Return the words in random order, and one of the right sentences."""
        if size == "demo":
            words = [
                *draws.sample(DEMO_NAMES, 2),
                draws.choice(DEMO_VERBS),
                draws.choice(DEMO_ITEMS),
                draws.choice(DEMO_PLACES),
            ]
        else:
            words = [*draws.sample(ADJECTIVES, 2), *draws.sample(NOUNS, 2), draws.choice(VERBS)]
        given = tuple(draws.shuffled(words))
        return Case(given, (draws.choice(sentences(given)),), tuple(sorted(given)))

    def question(self, case: Case, size: Size) -> str:
        """Return the words, and the form of the sentence."""
        if size == "demo":
            return f"Answer with all: {' '.join(case.given)}"
        return (
            f"Write one sentence with these words: {', '.join(case.given)}.\nIt has the form "
            '"The ADJECTIVE NOUN VERB the ADJECTIVE NOUN." and has each word exactly once, as it is written here. '
            "Answer with the sentence only."
        )

    def is_right(self, case: Case, answer: Answer) -> bool:
        """Return whether an answer is one of the right sentences."""
        return len(answer) == 1 and answer[0] in sentences(case.given)

    def form(self, size: Size) -> Form:
        """Return the form of a sentence."""
        return Sentence()


def sentences(words: tuple[str, ...]) -> list[str]:
    """Return the four right sentences of some words: the words of a class may change places."""
    if found := [word for word in words if word in DEMO_NAMES]:
        one, other = found
        (verb,), (item,), (place,) = (
            [word for word in words if word in known] for known in (DEMO_VERBS, DEMO_ITEMS, DEMO_PLACES)
        )
        return [
            told
            for giver, taker in ((one, other), (other, one))
            for told in (
                f"{giver} {verb} {item} to {taker} at the {place}.",
                f"At the {place}, {giver} {verb} {item} to {taker}.",
            )
        ]
    (first, second), (who, whom), (verb,) = (
        [word for word in words if word in known] for known in (ADJECTIVES, NOUNS, VERBS)
    )
    return [
        f"The {one} {subject} {verb} the {other} {thing}."
        for one, other in ((first, second), (second, first))
        for subject, thing in ((who, whom), (whom, who))
    ]


SENTENCES: Mapping[str, Kind] = {"words_to_sentence": WordsToSentence()}
"""Name of the kind -> the kind."""
