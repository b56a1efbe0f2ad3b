"""Word problems in GSM8K's schema, made by rule from a seed.

A problem is a short story with two or three steps of arithmetic on whole numbers below 1,000; its answer reasons
step by step and ends in `#### N`. The stories are simple, but an answer is not determined by its question: the order
of operands, the wording of every step and of the conclusion are free. That is what makes parallel decoding hard (two
tokens drawn at once may belong to different wordings), so that a worse decoder shows at once.

Test problems share no combination of numbers with training problems, whatever their story: see `is_held_out`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = {
    "she": ["Ada", "Mia", "Nora", "Lily", "Sara", "Emma", "Ruth", "Zoe"],
    "he": ["Tom", "Ben", "Leo", "Max", "Omar", "Sam", "Jack", "Paul"],
}
ITEMS = ["pencils", "marbles", "stickers", "apples", "cards", "shells", "beads", "stamps", "coins", "buttons"]
BOXES = ["boxes", "bags", "baskets", "crates", "jars"]
GOODS = ["pen", "book", "cake", "hat", "ball", "lamp", "cup", "toy"]
PLACES = ["market", "park", "school", "library", "station"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer, and the numbers the answer needs (distractors are not among them)."""

    story: str
    question: str
    answer: str
    numbers: tuple[int, ...]


def is_held_out(numbers: tuple[int, ...]) -> bool:
    """Whether a combination of numbers, in any order, is kept for the test set (one in twenty is)."""
    key = ",".join(map(str, sorted(numbers))).encode()
    return hashlib.sha256(key).digest()[0] % 20 == 0


class _Teller:
    """One problem in the making: random choices, and the steps of the answer so far."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.pronoun = rng.choice(["she", "he"])
        self.name, self.friend = rng.sample(NAMES[self.pronoun], 2)
        self.items = rng.choice(ITEMS)
        self.steps: list[str] = []

    def pick(self, *choices: str) -> str:
        return self.rng.choice(choices)

    def number(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def step(self, left: int, sign: str, right: int, unit: str) -> int:
        """Append "left sign right = result" in one of its wordings and return the result."""
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // max(right, 1)}[sign]
        if sign in "+*" and self.rng.random() < 0.5:
            left, right = right, left
        equation = f"{left} {sign} {right} = {result}"
        self.steps.append(
            self.pick(
                f"That is {equation} {unit}.",
                f"This makes {equation} {unit}.",
                f"We get {equation} {unit}.",
                f"So there are {equation} {unit}.",
                f"{equation} {unit}.",
            )
        )
        return result

    def distractor(self) -> str:
        """A sentence with a number that the answer does not need, in some problems."""
        if self.rng.random() > 0.4:
            return ""
        n = self.number(2, 60)
        return " " + self.pick(
            f"{self.name} is {n} years old.",
            f"It is {n} degrees outside.",
            f"The {self.rng.choice(PLACES)} is {n} miles away.",
            f"{self.friend} has {n} books.",
            f"It takes {n} minutes to get there.",
        )

    def problem(self, story: str, question: str, result: int, unit: str, numbers: tuple[int, ...]) -> Problem:
        conclusion = self.pick(
            f"The answer is {result} {unit}.", f"So the answer is {result}.", f"{result} {unit} in all.", ""
        )
        lines = [*self.steps, conclusion] if conclusion else self.steps
        return Problem(story, question, "\n".join([*lines, f"#### {result}"]), numbers)


def _ledger(t: _Teller) -> Problem:
    """A quantity goes up and down in one to three events."""
    total = t.number(50, 600)
    numbers = [total]
    text = t.pick(f"{t.name} has {total} {t.items}.", f"{t.name} starts with {total} {t.items}.") + t.distractor()
    for _ in range(t.number(1, 3)):
        if total > 900 or (total > 40 and t.rng.random() < 0.5):
            n = t.number(5, min(total - 5, 300))
            text += " " + t.pick(
                f"{t.pronoun.title()} gives {n} to {t.friend}.", f"Then {t.pronoun} loses {n}.", f"{t.name} sells {n}."
            )
            total = t.step(total, "-", n, t.items)
        else:
            n = t.number(5, min(995 - total, 300))
            text += " " + t.pick(
                f"{t.pronoun.title()} buys {n} more.", f"Then {t.pronoun} finds {n}.", f"{t.friend} brings {n} more."
            )
            total = t.step(total, "+", n, t.items)
        numbers.append(n)
    ask = t.pick(f"How many {t.items} does {t.name} have now?", f"How many {t.items} are there in the end?")
    return t.problem("ledger", f"{text} {ask}", total, t.items, tuple(numbers))


def _compare(t: _Teller) -> Problem:
    """One has so many more or fewer than the other; how many together."""
    mine = t.number(20, 400)
    more = t.rng.random() < 0.5
    n = t.number(5, 150) if more else t.number(5, mine - 5)
    text = f"{t.name} has {mine} {t.items}.{t.distractor()}"
    text += f" {t.friend} has {n} {'more' if more else 'fewer'} than {t.name}."
    ask = t.pick("How many do they have together?", f"How many {t.items} do they have in total?")
    other = t.step(mine, "+" if more else "-", n, t.items)
    return t.problem("compare", f"{text} {ask}", t.step(mine, "+", other, t.items), t.items, (mine, n))


def _groups(t: _Teller) -> Problem:
    """Equal groups, some taken away or added."""
    boxes, each = t.number(2, 9), t.number(5, 100)
    kind = t.rng.choice(BOXES)
    text = t.pick(
        f"There are {boxes} {kind} with {each} {t.items} in each.",
        f"{t.name} has {boxes} {kind}. Each holds {each} {t.items}.",
    )
    total = t.step(boxes, "*", each, t.items)
    away = t.rng.random() < 0.5
    n = t.number(2, total - 1) if away else t.number(2, 99)
    text += t.distractor() + " "
    if away:
        text += t.pick(f"{n} of them are taken out.", f"{t.friend} takes {n} {t.items}.")
    else:
        text += t.pick(f"{t.friend} adds {n} {t.items}.", f"There are {n} more on the table.")
    ask = t.pick(f"How many {t.items} are there now?", f"How many {t.items} is that?")
    now = t.step(total, "-" if away else "+", n, t.items)
    return t.problem("groups", f"{text} {ask}", now, t.items, (boxes, each, n))


def _bill(t: _Teller) -> Problem:
    """One of one thing and several of another."""
    one, many = t.rng.sample(GOODS, 2)
    price, n, each = t.number(5, 300), t.number(2, 9), t.number(2, 70)
    text = t.pick(
        f"A {one} costs {price} dollars and a {many} costs {each} dollars.",
        f"At the {t.rng.choice(PLACES)}, a {many} is {each} dollars and a {one} is {price} dollars.",
    )
    ask = t.pick(
        f"{t.name} buys {n} {many}s and one {one}. How much does {t.pronoun} pay?",
        f"How much do {n} {many}s and one {one} cost?",
    )
    goods = t.step(n, "*", each, "dollars")
    text += t.distractor()
    return t.problem("bill", f"{text} {ask}", t.step(goods, "+", price, "dollars"), "dollars", (price, n, each))


def _change(t: _Teller) -> Problem:
    """Money left after buying several things."""
    n, each = t.number(2, 9), t.number(2, 90)
    thing = t.rng.choice(GOODS)
    money = t.number(n * each + 1, min(n * each + 300, 999))
    text = t.pick(f"{t.name} has {money} dollars.", f"{t.name} takes {money} dollars to the {t.rng.choice(PLACES)}.")
    text += t.distractor() + " "
    text += t.pick(
        f"{t.pronoun.title()} buys {n} {thing}s for {each} dollars each.",
        f"{t.pronoun.title()} pays for {n} {thing}s that cost {each} dollars each.",
    )
    ask = t.pick("How many dollars are left?", f"How much money does {t.pronoun} have left?")
    cost = t.step(n, "*", each, "dollars")
    return t.problem("change", f"{text} {ask}", t.step(money, "-", cost, "dollars"), "dollars", (money, n, each))


def _pages(t: _Teller) -> Problem:
    """A book read over days; how many pages are left."""
    first, second = t.rng.sample(DAYS, 2)
    total = t.number(200, 990)
    a, b = t.number(10, 90), t.number(10, 90)
    text = t.pick(f"A book has {total} pages.", f"{t.name} wants to read a book of {total} pages.") + t.distractor()
    text += f" {t.name} reads {a} pages on {first} and {b} on {second}."
    ask = t.pick("How many pages are left?", f"How many pages does {t.pronoun} still have to read?")
    if t.rng.random() < 0.5:
        left = t.step(total, "-", t.step(a, "+", b, "pages"), "pages")
    else:
        left = t.step(t.step(total, "-", a, "pages"), "-", b, "pages")
    return t.problem("pages", f"{text} {ask}", left, "pages", (total, a, b))


def _machine(t: _Teller) -> Problem:
    """A rate over hours, less the broken ones."""
    rate, hours = t.number(5, 100), t.number(2, 9)
    broken = t.number(2, rate * hours - 1)
    text = t.pick(f"A machine makes {rate} {t.items} an hour.", f"In one hour, a machine makes {rate} {t.items}.")
    text += f" It runs for {hours} hours.{t.distractor()} "
    text += t.pick(f"{broken} of them are broken.", f"But {broken} {t.items} are bad.")
    ask = t.pick(f"How many good {t.items} are there?", f"How many {t.items} can be sold?")
    made = t.step(rate, "*", hours, t.items)
    return t.problem("machine", f"{text} {ask}", t.step(made, "-", broken, t.items), t.items, (rate, hours, broken))


def _share(t: _Teller) -> Problem:
    """Equal shares, then some more for each."""
    bags, share, extra = t.number(2, 9), t.number(3, 100), t.number(2, 99)
    total = bags * share
    kind = t.rng.choice(BOXES)
    text = t.pick(
        f"{t.name} puts {total} {t.items} into {bags} {kind}, the same number in each.",
        f"{total} {t.items} are shared equally among {bags} {kind}.",
    )
    text += t.distractor() + " " + t.pick(f"Then {t.pronoun} adds {extra} to every one.", f"Each gets {extra} more.")
    ask = t.pick(f"How many {t.items} are in each?", f"How many {t.items} does each hold now?")
    each = t.step(total, "/", bags, t.items)
    return t.problem("share", f"{text} {ask}", t.step(each, "+", extra, t.items), t.items, (total, bags, extra))


def _bus(t: _Teller) -> Problem:
    """Passengers get off and on."""
    start = t.number(40, 400)
    off, on = t.number(5, start - 5), t.number(5, 300)
    place = t.rng.choice(PLACES)
    text = t.pick(f"A train has {start} people on it.", f"{start} people are on a train.") + t.distractor()
    text += f" At the {place}, " + t.pick(f"{off} get off and {on} get on.", f"{on} get on and {off} get off.")
    ask = t.pick("How many people are on the train now?", "How many people is that?")
    if t.rng.random() < 0.5:
        now = t.step(t.step(start, "-", off, "people"), "+", on, "people")
    else:
        now = t.step(t.step(start, "+", on, "people"), "-", off, "people")
    return t.problem("bus", f"{text} {ask}", now, "people", (start, off, on))


def _savings(t: _Teller) -> Problem:
    """A weekly amount on top of what there was."""
    weekly, weeks, before = t.number(5, 90), t.number(2, 9), t.number(5, 180)
    text = t.pick(f"{t.name} saves {weekly} dollars a week.", f"Every week, {t.name} saves {weekly} dollars.")
    text += t.distractor() + f" {t.pronoun.title()} "
    text += t.pick(f"already had {before} dollars.", f"began with {before} dollars.")
    ask = t.pick(f"How many dollars does {t.pronoun} have after {weeks} weeks?", f"How much is it after {weeks} weeks?")
    total = t.step(t.step(weekly, "*", weeks, "dollars"), "+", before, "dollars")
    return t.problem("savings", f"{text} {ask}", total, "dollars", (weekly, weeks, before))


STORIES: tuple[Callable[[_Teller], Problem], ...] = (
    _ledger, _compare, _groups, _bill, _change, _pages, _machine, _share, _bus, _savings,
)  # fmt: skip


def problems(seed: int, *, held_out: bool) -> Iterator[Problem]:
    """Yield problems without end, the stories in turn; `held_out` chooses the side of the split they come from."""
    rng = random.Random(f"{seed}/{'test' if held_out else 'train'}")
    while True:
        for story in STORIES:
            while is_held_out((problem := story(_Teller(rng))).numbers) != held_out:
                pass
            yield problem
