"""The generated documents: their answers by other means than the package's, and what is not right."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdar_lm_eval.demo import CHECKPOINT
from sdar_lm_eval.tasks.generated import KINDS, Document, documents, is_held_out, is_right, stream
from sdar_lm_eval.tasks.generated.draws import Draws
from sdar_lm_eval.tasks.generated.forms import Grid, JsonList, Sentence, SpacedLine
from sdar_lm_eval.tasks.generated.grids import SOLVED
from sdar_lm_eval.tasks.generated.kind import SIZES
from sdar_lm_eval.tasks.generated.sentences import ADJECTIVES, DEMO_ITEMS, DEMO_PLACES, DEMO_VERBS, NOUNS, VERBS
from sdar_lm_eval.tasks.generated.waiting_line import DEMO_NAMES, FIRST_NAMES, LAST_NAMES

a_document = st.builds(
    lambda kind, size, seed: next(stream(kind, size, seed=seed, held_out=False)),
    st.sampled_from(list(KINDS)),
    st.sampled_from(SIZES),
    st.integers(0, 2**40),
)


def scored(document: Document, response: str) -> tuple[bool, bool]:
    """Whether a response is right by the strict form and by the lenient one."""
    form = KINDS[document["kind"]].form(document["size"])
    return is_right(document, form.strict(response)), is_right(document, form.lenient(response))


def parts(document: Document) -> list[str]:
    answer = KINDS[document["kind"]].form(document["size"]).strict(document["answer"])
    assert answer is not None
    return list(answer)


def expected(document: Document) -> list[str] | None:
    """The right answer by plain list operations, where only one is right."""
    line, place = list(document["given"]), document["place"] - 1
    match document["kind"]:
        case "copy":
            return line
        case "reverse":
            return [line[-1 - i] for i in range(len(line))]
        case "sort":
            return sorted(line, key=lambda name: name.split()[-1])
        case "insert_index":
            line.insert(place, document["word"])
            return line
        case "remove_index":
            del line[place]
            return line
        case "replace_index":
            line[place] = document["word"]
            return line
    return None


def right_ones(document: Document) -> list[list[str]] | None:
    """All right answers, by brute force over orders, places and grids; None where they are too many."""
    line, word = document["given"], document["word"]
    match document["kind"]:
        case "shuffle":
            return (
                [list(order) for order in itertools.permutations(line) if list(order) != line]
                if len(line) < 7
                else None
            )
        case "insert_random":
            return [[*line[:i], word, *line[i:]] for i in range(len(line) + 1)]
        case "remove_random":
            return [list(rest) for rest in itertools.combinations(line, len(line) - 1)]
        case "replace_random":
            return [[word if i == place else name for i, name in enumerate(line)] for place in range(len(line))]
        case "latin_square":
            return [[cell for row in rows for cell in row] for rows in _latin(line)]
        case "sudoku":
            return [
                [cell for row in rows for cell in row]
                for rows in _latin(list("1234"))
                if all(len({rows[r + i][c + j] for i in (0, 1) for j in (0, 1)}) == 4 for r in (0, 2) for c in (0, 2))
                and all(shown in ("_", rows[i // 4][i % 4]) for i, shown in enumerate(line))
            ]
    only = expected(document)
    return [only] if only else None


def _latin(symbols: list[str]) -> list[tuple[tuple[str, ...], ...]]:
    rows = list(itertools.permutations(symbols))
    return [
        grid
        for grid in itertools.product(rows, repeat=4)
        if all(len(set(column)) == 4 for column in zip(*grid, strict=True))
    ]


_LATIN_SQUARES = _latin(list("1234"))


@pytest.fixture(autouse=True)
def _latin_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """331,776 grids are tried once."""

    def squares(symbols: list[str]) -> Any:
        names = dict(zip("1234", symbols, strict=True))
        return [tuple(tuple(names[cell] for cell in row) for row in grid) for grid in _LATIN_SQUARES]

    monkeypatch.setattr(sys.modules[__name__], "_latin", squares)


@settings(max_examples=300, deadline=None)
@given(document=a_document)
def test_every_answer_is_accepted(document: Document) -> None:
    assert scored(document, document["answer"]) == (True, True)
    assert scored(document, f"\n {document['answer']}\n") == (True, True)
    only = expected(document)
    assert only is None or parts(document) == only
    form = KINDS[document["kind"]].form(document["size"])
    for right in right_ones(document) or []:
        assert scored(document, form.write(tuple(right))) == (True, True)


@settings(max_examples=300, deadline=None)
@given(document=a_document, draw=st.data())
def test_every_other_answer_is_refused(document: Document, draw: st.DataObject) -> None:
    """An answer with a part swapped, doubled, left out or replaced is right only where brute force says so."""
    right = right_ones(document)
    assume(right is not None)
    answer = parts(document)
    i, j = (draw.draw(st.integers(0, len(answer) - 1)) for _ in range(2))
    other = draw.draw(st.sampled_from([*document["given"], "Nobody", "1", document["word"] or "x"]))
    changed = draw.draw(
        st.sampled_from(
            [
                [answer[j] if k == i else answer[i] if k == j else part for k, part in enumerate(answer)],
                answer[:i] + answer[i + 1 :],
                [*answer[:i], other, *answer[i:]],
                [*answer[:i], other, *answer[i + 1 :]],
                answer[::-1],
                document["given"],
            ]
        )
    )
    form = KINDS[document["kind"]].form(document["size"])
    assert is_right(document, tuple(changed)) == (changed in right)
    assert scored(document, form.write(tuple(changed)))[0] == (changed in right)


@pytest.mark.parametrize("size", SIZES)
def test_a_shuffled_line_is_another_order_of_everybody(size: Any) -> None:
    """For lines too long for all orders."""
    for document in documents("shuffle", size, 20):
        form, line = KINDS["shuffle"].form(size), document["given"]
        assert not is_right(document, tuple(line))
        assert is_right(document, (*line[1:], line[0]))
        assert not is_right(document, (line[0], *line[:-1]))
        assert not is_right(document, tuple(line[1:]))
        assert form.strict(document["answer"]) != tuple(line)


def test_the_sentences_of_some_words() -> None:
    document = next(stream("words_to_sentence", "chat", seed=0, held_out=False)) | {
        "given": ["helps", "king", "proud", "baker", "wise"],
        "answer": "The wise king helps the proud baker.",
    }
    right = {
        f"The {one} {who} helps the {other} {whom}."
        for one, other in (("wise", "proud"), ("proud", "wise"))
        for who, whom in (("king", "baker"), ("baker", "king"))
    }
    words = ["The", "the", "wise", "proud", "king", "baker", "helps"]
    for order in itertools.permutations(words):
        sentence = " ".join(order) + "."
        assert scored(document, sentence)[0] == (sentence in right)
    for wrong in (
        "The wise king helps the proud king.",
        "The wise king helps the baker.",
        "The wise king helped the proud baker.",
    ):
        assert scored(document, wrong) == (False, False)
    lenient = (
        "the wise king helps the proud baker",
        '"The wise king helps the proud baker."',
        "Here it is:\n\n- The wise king  helps the proud baker!",
        "**The wise king helps the proud baker.**",
    )
    for text in lenient:
        assert scored(document, text) == (False, True), text


def test_the_demo_s_sentences() -> None:
    document = next(stream("words_to_sentence", "demo", seed=0, held_out=False)) | {
        "given": ["park", "Zoe", "gives", "Ben", "coins"],
        "answer": "Zoe gives coins to Ben at the park.",
    }
    for right in ("Zoe gives coins to Ben at the park.", "At the park, Ben gives coins to Zoe."):
        assert scored(document, right) == (True, True)
    for wrong in ("Zoe gives coins to Zoe at the park.", "At the park, Zoe gives coins to Ben at the park.", "At Ben."):
        assert scored(document, wrong) == (False, False)


def test_a_sudoku_has_one_solution() -> None:
    """Beside all 331,776 grids whose rows are orders of the digits."""
    assert len(_LATIN_SQUARES) == 576 and len(SOLVED) == 288
    for size in SIZES:
        for document in documents("sudoku", size, 100):
            assert right_ones(document) == [parts(document)]
            assert document["given"].count("_") == {"chat": 4, "demo": 6}[size]


# What a chat model may write around its answer; (response, strict, lenient) for ["Ann Lee", "Bo Yu"].
LISTS = [
    ('["Ann Lee", "Bo Yu"]', True, True),
    ('["Ann Lee","Bo Yu"]', True, True),
    ('[\n  "Ann Lee",\n  "Bo Yu"\n]', True, True),
    ('Here is the list:\n["Ann Lee", "Bo Yu"]', False, True),
    ('```json\n["Ann Lee", "Bo Yu"]\n```', False, True),
    ("['Ann Lee', 'Bo Yu']", False, True),
    ("[Ann Lee, Bo Yu]", False, True),
    ('["Bo Yu", "Ann Lee"] becomes ["Ann Lee", "Bo Yu"]', False, True),
    ('["Ann Lee", "Bo Yu"', False, True),
    ("Ann Lee, Bo Yu", False, True),
    ("Ann Lee, Bo Yu.", False, True),
    ("1. Ann Lee\n2. Bo Yu", False, False),
    ('["Ann Lee"], ["Bo Yu"]', False, False),
    ('["Ann Lee", ["Bo Yu"]]', False, False),
    ('{"line": ["Ann Lee", 2]}', False, False),
    ('{"Ann Lee": 1, "Bo Yu": 2}', False, False),
    ("", False, False),
    ("[" * 100_000, False, False),
]  # fmt: skip


@pytest.mark.parametrize("text,strict,lenient", LISTS)
def test_lists(text: str, strict: bool, lenient: bool) -> None:
    right = ("Ann Lee", "Bo Yu")
    assert (JsonList().strict(text) == right, JsonList().lenient(text) == right) == (strict, lenient)


@pytest.mark.parametrize(
    "text,strict,lenient",
    [("Ann Bo", True, True), (" Ann Bo\n", True, True), ("Ann  Bo", False, True), ("Ann, Bo.", False, True),
     ("Sure:\nAnn Bo", False, True), ('["Ann", "Bo"]', False, True), ("Ann\nBo", False, False), ("", False, False)],
)  # fmt: skip
def test_lines(text: str, strict: bool, lenient: bool) -> None:
    right = ("Ann", "Bo")
    assert (SpacedLine().strict(text) == right, SpacedLine().lenient(text) == right) == (strict, lenient)


@pytest.mark.parametrize(
    "text,strict,lenient",
    [("A,B\nB,A", True, True), ("A, B\nB, A", False, True), ("A B\nB A", False, True), ("AB\nBA", False, True),
     ("```\nA,B\nB,A\n```", False, True), ("| A | B |\n|---|---|\n| B | A |", False, True),
     ("B,A\nA,B\n\nis wrong, so:\n\nA,B\nB,A", False, True), ("A,B", False, False), ("A,B,\nB,A,", False, True),
     ("A,B\nB,A\nA,B", False, False), ("A\nB,B,A", False, False), ("", False, False)],
)  # fmt: skip
def test_grids(text: str, strict: bool, lenient: bool) -> None:
    form, right = Grid(2, ","), ("A", "B", "B", "A")
    assert (form.strict(text) == right, form.lenient(text) == right) == (strict, lenient)


@given(text=st.text())
def test_any_text_is_read(text: str) -> None:
    for form in (JsonList(), SpacedLine(), Grid(4, ","), Grid(4, ""), Sentence()):
        form.strict(text)
        found = form.lenient(text)
        assert found is None or all(found)


def test_forms_read_what_they_write() -> None:
    for kind, size in itertools.product(KINDS, SIZES):
        form = KINDS[kind].form(size)
        for document in documents(kind, size, 5):
            answer = form.strict(document["answer"])
            assert answer is not None and form.lenient(document["answer"]) == answer
            assert form.write(answer) == document["answer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_documents(kind: str, size: Any) -> None:
    drawn = documents(kind, size, 100)
    assert drawn == documents(kind, size, 100)
    assert documents(kind, size, 10) == drawn[:10]
    assert documents(kind, size, 10, seed=1) != drawn[:10]
    assert len({document["question"] for document in drawn}) == 100
    if KINDS[kind].form(size).__class__ in (JsonList, SpacedLine):
        lengths = Counter(len(document["given"]) for document in drawn)
        assert set(lengths) == ({3, 4, 5, 6, 15} if size == "chat" else {3, 4, 5, 6})
        assert min(lengths.values()) > 15
        for document in drawn:
            people = [*document["given"], *([document["word"]] if document["word"] else [])]
            assert len({name.split()[-1] for name in people}) == len(people)


def key(document: Document) -> tuple[str, ...]:
    """The names, words, symbols or solution of a document."""
    if document["kind"] == "sudoku":
        return (document["answer"].replace("\n", "").replace(",", ""),)
    return tuple(sorted([*document["given"], *([document["word"]] if document["word"] else [])]))


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_test_share_no_case(kind: str) -> None:
    test = {key(document) for document in documents(kind, "demo", 100)}
    train = {key(document) for document in itertools.islice(stream(kind, "demo", seed=0, held_out=False), 3000)}
    assert not test & train
    assert all(map(is_held_out, test)) and not any(map(is_held_out, train))


@given(count=st.integers(1, 40), seed=st.text())
def test_draws(count: int, seed: str) -> None:
    draws, items = Draws(seed), list(range(count))
    assert 0 <= draws.below(count) < count
    assert draws.choice(items) in items
    assert sorted(draws.shuffled(items)) == items
    assert len(set(draws.sample(items, count // 2))) == count // 2
    assert items == list(range(count))


def test_draws_are_uniform() -> None:
    draws = Draws("x")
    orders = Counter(tuple(draws.shuffled("abc")) for _ in range(6000))
    assert len(orders) == 6 and all(850 < seen < 1150 for seen in orders.values())


def test_the_words_are_apart() -> None:
    for lists in (
        (ADJECTIVES, NOUNS, VERBS),
        (DEMO_NAMES, DEMO_VERBS, DEMO_ITEMS, DEMO_PLACES),
        (FIRST_NAMES,),
        (LAST_NAMES,),
    ):
        words = [word for words in lists for word in words]
        assert len(set(words)) == len(words)


def test_the_demo_s_words_are_tokens() -> None:
    """One each, as they stand in a question; so 1 step a block decides four at once."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    for word in (*DEMO_NAMES, *DEMO_VERBS, *DEMO_ITEMS, *DEMO_PLACES):
        assert len(tokenizer.encode(f" {word}").ids) == 1, word
    for name in DEMO_NAMES:
        assert len(tokenizer.encode(name).ids) == 1, name


def digest(found: list[Document]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


ALL = "[d for k in KINDS for s in ('chat', 'demo') for d in documents(k, s, 100)]"
DIGEST = "f87235e75cbb4ad7"
FIRST = Path(__file__).with_name("generated_documents.jsonl")


def test_the_first_documents() -> None:
    """The same for everybody who has this version of the tasks."""
    rows = [json.loads(line) for line in FIRST.read_text().splitlines()]
    assert [(row["kind"], row["size"]) for row in rows] == list(itertools.product(KINDS, SIZES))
    for row in rows:
        (document,) = documents(row["kind"], row["size"], 1)
        assert (document["question"], document["answer"]) == (row["question"], row["answer"])
    assert digest([d for k in KINDS for s in SIZES for d in documents(k, s, 100)]) == DIGEST


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_other_processes_draw_the_same(hash_seed: str) -> None:
    program = (
        "import hashlib, json; from sdar_lm_eval.tasks.generated import KINDS, documents; "
        f"found = {ALL}; print(hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16])"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == DIGEST
