"""A line of waiting people: copied, reversed, shuffled, sorted, or with one person inserted, removed or replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sdar_lm_eval.tasks.generated.draws import Draws
from sdar_lm_eval.tasks.generated.forms import JsonList, SpacedLine
from sdar_lm_eval.tasks.generated.kind import Answer, Case, Form, Kind, Size

LENGTHS: Mapping[Size, tuple[int, ...]] = {"chat": (3, 4, 5, 6, 15), "demo": (3, 4, 5, 6)}
"""The numbers of people in a line; a task's documents take them in turn."""

# The names that the checkpoint's word problems have, so that each of them is one token.
DEMO_NAMES = (
    "Ada", "Ben", "Emma", "Jack", "Leo", "Lily", "Max", "Mia", "Nora", "Omar", "Paul", "Ruth", "Sam", "Sara", "Tom",
    "Zoe",
)  # fmt: skip
FIRST_NAMES = (
    "Alice", "Amir", "Anna", "Boris", "Carla", "Chen", "Clara", "Daniel", "Dina", "Elena", "Erik", "Fatima", "Felix",
    "Grace", "Hana", "Hugo", "Ines", "Ivan", "Jonas", "Julia", "Karim", "Laura", "Liam", "Lucia", "Marco", "Maya",
    "Nadia", "Noah", "Olga", "Oscar", "Petra", "Rafael", "Rosa", "Simon", "Sofia", "Tariq", "Theo", "Vera", "Yuki",
    "Zara",
)  # fmt: skip
LAST_NAMES = (
    "Adams", "Baker", "Bauer", "Brooks", "Campbell", "Castro", "Dubois", "Evans", "Fischer", "Foster", "Garcia",
    "Hansen", "Hughes", "Ibrahim", "Jensen", "Keller", "Khan", "Kowalski", "Larsen", "Lopez", "Meyer", "Moreau",
    "Nakamura", "Novak", "Olsen", "Ortiz", "Parker", "Petrov", "Quinn", "Rossi", "Santos", "Schmidt", "Silva", "Tanaka",
    "Turner", "Ueda", "Vargas", "Weber", "Yilmaz", "Zhang",
)  # fmt: skip

Names = tuple[str, ...]


@dataclass(frozen=True)
class WaitingLine(Kind):
    """A change of a line.

    Attributes:
        wordings: size -> the question's wording, with `{word}` and `{place}`, for each size.
        change: (the line, `word`, `place`) -> the changed line. It is right for every place where `places` is given
            and the question does not name one.
        places: the number of places that a line of so many people has for the change; None: the change has no place.
    """

    wordings: Mapping[Size, str]
    change: Callable[[Names, str, int], Names]
    places: Callable[[int], int] | None = None

    def draw(self, draws: Draws, size: Size, number: int) -> Case:
        """Return a line of different names. No two people of a line have the same last name."""
        length = LENGTHS[size][number % len(LENGTHS[size])]
        drawn = _people(draws, size, length + 1)
        given = tuple(drawn[:length])
        word = drawn[length] if "{word}" in self.wordings[size] else ""
        place = 1 + draws.below(self.places(length)) if self.places else 0
        answer = self.change(given, word, place)
        key = tuple(sorted((*given, word) if word else given))
        named = place if "{place}" in self.wordings[size] else 0
        return Case(given, answer, key, word, named)

    def question(self, case: Case, size: Size) -> str:
        """Return the line, and what to do with it."""
        task = self.wordings[size].format(word=case.word, place=case.place)
        line = self.form(size).write(case.given)
        if size == "demo":
            return f"{task}: {line}"
        return (
            f"These people wait in line, the first in front:\n{line}\n\n{task} "
            "Answer with the new line only, as a JSON list in the same form."
        )

    def is_right(self, case: Case, answer: Answer) -> bool:
        """Return whether an answer is the changed line, or one of them where the place is free."""
        if self.places is None or case.place:
            return answer == self.change(case.given, case.word, case.place)
        places = range(1, 1 + self.places(len(case.given)))
        return any(answer == self.change(case.given, case.word, place) for place in places)

    def form(self, size: Size) -> Form:
        """Return a JSON list for chat models, a line of words for the bundled checkpoint."""
        return JsonList() if size == "chat" else SpacedLine()


class Shuffle(WaitingLine):
    """The same people in another order. Every other order is right."""

    def draw(self, draws: Draws, size: Size, number: int) -> Case:
        """Return a line, and one of the other orders as the answer."""
        case = super().draw(draws, size, number)
        answer = case.given
        while answer == case.given:
            answer = tuple(draws.shuffled(case.given))
        return Case(case.given, answer, case.key)

    def is_right(self, case: Case, answer: Answer) -> bool:
        """Return whether an answer has everybody once, in another order."""
        return answer != case.given and sorted(answer) == sorted(case.given)


def _people(draws: Draws, size: Size, count: int) -> list[str]:
    if size == "demo":
        return draws.sample(DEMO_NAMES, count)
    last_names = draws.sample(LAST_NAMES, count)
    return [f"{draws.choice(FIRST_NAMES)} {last_name}" for last_name in last_names]


def _by_last_name(names: Names, word: str, place: int) -> Names:
    return tuple(sorted(names, key=lambda name: name.rpartition(" ")[2]))


def _same(names: Names, word: str, place: int) -> Names:
    return names


def _reversed(names: Names, word: str, place: int) -> Names:
    return names[::-1]


def _inserted(names: Names, word: str, place: int) -> Names:
    return (*names[: place - 1], word, *names[place - 1 :])


def _removed(names: Names, word: str, place: int) -> Names:
    return (*names[: place - 1], *names[place:])


def _replaced(names: Names, word: str, place: int) -> Names:
    return (*names[: place - 1], word, *names[place:])


def _gaps(length: int) -> int:
    return length + 1


_FIRST = "The first is number 1."
WAITING_LINE: Mapping[str, WaitingLine] = {
    "copy": WaitingLine({"chat": "Repeat the line as it is.", "demo": "Copy"}, _same),
    "reverse": WaitingLine(
        {"chat": "Turn the line around: the last person becomes the first.", "demo": "Reverse"}, _reversed
    ),
    "shuffle": Shuffle({"chat": "Put the same people into any other order.", "demo": "Shuffle"}, _same),
    "sort": WaitingLine({"chat": "Order the line alphabetically by last name.", "demo": "Sort"}, _by_last_name),
    "insert_index": WaitingLine(
        {"chat": f"Insert {{word}} as number {{place}} of the line. {_FIRST}", "demo": "Put {word} at {place}"},
        _inserted,
        _gaps,
    ),
    "insert_random": WaitingLine(
        {"chat": "Insert {word} anywhere in the line.", "demo": "Put {word} in"}, _inserted, _gaps
    ),
    "remove_index": WaitingLine(
        {"chat": f"Remove number {{place}} from the line. {_FIRST}", "demo": "Take out {place}"}, _removed, int
    ),
    "remove_random": WaitingLine(
        {"chat": "Remove any one person from the line.", "demo": "Take one out"}, _removed, int
    ),
    "replace_index": WaitingLine(
        {"chat": f"Put {{word}} in the place of number {{place}}. {_FIRST}", "demo": "Now {word} is {place}"},
        _replaced,
        int,
    ),
    "replace_random": WaitingLine(
        {"chat": "Put {word} in the place of any one person.", "demo": "Now {word} is one"}, _replaced, int
    ),
}
"""Name of the kind -> the kind."""
