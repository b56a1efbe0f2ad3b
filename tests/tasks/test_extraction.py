from __future__ import annotations

import json
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdar_lm_eval.tasks.extraction import INVALID, MAX_CHARACTERS, flexible_extract, gold_number, strict_match

# Response, number. Both filters agree where a mark announces the answer.
MARKED = [
    # The plain forms.
    (r"\boxed{18}", "18"),
    (r"So she makes $\boxed{18}$ a day.", "18"),
    (r"\[\boxed{18}\]", "18"),
    (r"\boxed{18}.", "18"),
    (r"**\boxed{18}**", "18"),
    ("#### 18", "18"),
    ("3 * 6 = 18\n#### 18\n", "18"),
    ("####18", "18"),
    ("so #### 18", "18"),
    # Which mark counts.
    (r"\boxed{3} no: \boxed{4}", "4"),
    ("#### 3\n#### 4", "4"),
    ("#### 3 #### 4", "4"),
    (r"\boxed{3} and #### 4", "4"),
    (r"#### 3 and \boxed{4}", "4"),
    (r"\boxed{5}, as asked in \boxed{}", "5"),
    (r"\boxed{5} \boxed{ } \boxed{\text{eggs}} \boxed{?} \boxed{x}", "5"),
    (r"\boxed{5} 6 7", "5"),
    ("#### 5\nNow 6 and 7.", "5"),
    # Thousands, decimals, signs, currencies, percent.
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{1\,000}", "1000"),
    (r"\boxed{1\ 000}", "1000"),
    (r"\boxed{1,\!000}", "1000"),
    (r"\boxed{1 000}", "1000"),
    ("\\boxed{1\u202f234\u202f567}", "1234567"),
    (r"\boxed{1,234,567.50}", "2469135/2"),
    (r"\boxed{18.00}", "18"),
    (r"\boxed{.5}", "1/2"),
    (r"\boxed{007}", "7"),
    (r"\boxed{-0}", "0"),
    (r"\boxed{+5}", "5"),
    (r"\boxed{-5}", "-5"),
    (r"\boxed{- 5}", "-5"),
    (r"\boxed{$-$5}", "-5"),
    ("\\boxed{\u22125}", "-5"),
    (r"\boxed{\$18}", "18"),
    (r"\boxed{$18}", "18"),
    (r"\boxed{\$\,18}", "18"),
    (r"\boxed{\$ 18}", "18"),
    (r"\boxed{-\$18}", "-18"),
    (r"\boxed{\$-18}", "-18"),
    (r"\boxed{€18}", "18"),
    (r"\boxed{5\%}", "5"),
    (r"\boxed{90^\circ}", "90"),
    ("\\boxed{\uff11\uff0c\uff10\uff10\uff10}", "1000"),
    # Other countries' groups of digits, digits and currencies.
    (r"\boxed{1,00,000}", "100000"),
    (r"\boxed{1{,}00{,}000}", "100000"),
    (r"\boxed{1\,00\,000}", "100000"),
    (r"\boxed{-12,34,567.50}", "-2469135/2"),
    (r"\boxed{₹1,00,000}", "100000"),
    ("#### ₹1,00,000", "100000"),
    (r"\boxed{1'000}", "1000"),
    ("\\boxed{1\u2019234\u2019567.5}", "2469135/2"),
    (r"\boxed{1.234.567}", "1234567"),
    (r"\boxed{-₩18,000}", "-18000"),
    (r"\boxed{₱18}", "18"),
    (r"\boxed{18₫}", "18"),
    (r"\boxed{\text{₺}18}", "18"),
    ("\\boxed{\uff0418}", "18"),
    ("\\boxed{\u0967\u096e}", "18"),  # Devanagari
    ("\\boxed{\u0661\u066c\u0660\u0660\u0660\u066b\u0665}", "2001/2"),  # Arabic
    ("\\boxed{\U0001d7cf\U0001d7d6}", "18"),  # mathematical bold
    ("\\boxed{1\u20442}", "1/2"),
    ("#### -5", "-5"),
    ("#### $1,234.50.", "2469/2"),
    ("#### -$1,234", "-1234"),
    ("#### - 5", "-5"),
    ("#### 18.", "18"),
    ("#### **18**", "18"),
    ("#### `18`", "18"),
    ('#### "18".', "18"),
    (r"#### \(18\)", "18"),
    (r"#### \boxed{18}", "18"),
    ("#### 5%", "5"),
    # Fractions.
    (r"\boxed{1/2}", "1/2"),
    (r"\boxed{0.5}", "1/2"),
    (r"\boxed{2 / 4}", "1/2"),
    (r"\boxed{\frac{1}{2}}", "1/2"),
    (r"\boxed{\dfrac{1}{2}}", "1/2"),
    (r"\boxed{\dfrac12}", "1/2"),
    (r"\boxed{\frac{1}2}", "1/2"),
    (r"\boxed{-\frac{1}{2}}", "-1/2"),
    (r"\boxed{\frac{-1}{2}}", "-1/2"),
    (r"\boxed{\frac{1{,}000}{8}}", "125"),
    (r"\boxed{1\frac{1}{2}}", "3/2"),
    (r"\boxed{1 \frac{1}{2}}", "3/2"),
    (r"\boxed{-1\tfrac12}", "-3/2"),
    (r"\boxed{1 1/2}", "3/2"),
    (r"\boxed{1½}", "3/2"),
    (r"\boxed{¾}", "3/4"),
    # Units and remarks.
    (r"\boxed{18 \text{ dollars}}", "18"),
    (r"\boxed{18\text{ eggs in 7 days}}", "18"),
    (r"\boxed{\text{Day 2: } 18}", "18"),
    (r"\boxed{\text{18}}", "18"),
    (r"\boxed{\text{18 dollars}}", "18"),
    (r"\boxed{\textbf{18}}", "18"),
    (r"\boxed{\mathbf{-18}}", "-18"),
    (r"\boxed{18 eggs}", "18"),
    (r"\boxed{18kg}", "18"),
    (r"\boxed{5 \text{ m}^2}", "5"),
    (r"\boxed{5 cm^{2}}", "5"),
    (r"\boxed{5\,\mathrm{m}^{2}}", "5"),
    ("#### 18 dollars", "18"),
    ("#### 18 eggs in 7 days", "18"),
    ("#### 18 (for 9 eggs)", "18"),
    ("#### Answer: 18", "18"),
    ("#### **Final Answer:** $18", "18"),
    ("#### The final answer is 18.", "18"),
    ("#### 答案：18", "18"),
    # Equations.
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{x_1 = 5}", "5"),
    (r"\boxed{x_{1} = 5}", "5"),
    (r"\boxed{x = - 5}", "-5"),
    (r"\boxed{10-5=5}", "5"),
    (r"\boxed{9 + 9 = 18}", "18"),
    (r"\boxed{18 = 9 + 9}", "18"),
    (r"\boxed{3 \times 6 = 18 \text{ eggs}}", "18"),
    (r"\boxed{x \approx 18}", "18"),
    (r"\boxed{\text{Total} = \$70{,}000}", "70000"),
    ("#### 20*3=60", "60"),
    ("#### 9 + 9 = 2 x 9 = 18 eggs", "18"),
    ("#### 18 (2 * 9 eggs = 18)", "18"),
    # Braces.
    (r"\boxed{{18}}", "18"),
    (r"\boxed{{1}{8}} \boxed{\mathbf{{18}}}", "18"),
    (r"\boxed{\boxed{18}}", "18"),
    (r"\boxed {18}", "18"),
    (r"\fbox{18}", "18"),
    (r"boxed{18}", "18"),
    ("\\boxed{\n  18\n}", "18"),
    # The response was cut.
    (r"so \boxed{18", "18"),
    (r"so \boxed{18 \text{ dol", "18"),
    ("so \\boxed{\n18", "18"),
    ("\\boxed{18\nThat is 2 a day", "18"),
    (r"\boxed{18} or \boxed{", "18"),
    (r"so \boxed{\frac{1}{2}", "1/2"),
    # Another notation.
    (r"\boxed{1e5}", "100000"),
    (r"\boxed{2.5E-1}", "1/4"),
]

# Response, number for flexible-extract; strict-match finds no mark that announces a number.
UNMARKED = [
    ("", INVALID),
    ("   \n", INVALID),
    ("I do not know.", INVALID),
    ("18", "18"),
    ("The answer is 18.", "18"),
    ("The answer is **18**.", "18"),
    ("The answer is _18_.", "18"),
    ("It is 18 dollars...", "18"),
    ("First 3, then 6, so 18", "18"),
    ("$$\n18\n$$", "18"),
    ("$18$", "18"),
    ("18.00", "18"),
    ("$1,000", "1000"),
    ("1,000, and no more", "1000"),
    ("US$1,234.50.", "2469/2"),
    ("Rs.500", "500"),
    ("5%", "5"),
    ("It is -5", "-5"),
    ("It is \u22125", "-5"),
    ("It is \u20135", "-5"),
    ("(-5)", "-5"),
    ("$-5$", "-5"),
    ("$$-5$$", "-5"),
    ("-$5", "-5"),
    ("x=-5", "-5"),
    # A sign after a value is an operator or a dash.
    ("10-5", "5"),
    ("10 - 5", "5"),
    ("10\u201315", "15"),
    ("$10-$15", "15"),
    ("(2)-5", "5"),
    ("total--5", "5"),
    ("COVID-19", "19"),
    ("- 5 eggs", "5"),
    # A sentence's commas and points are not the number's.
    ("3,4", "4"),
    ("1,2,3", "3"),
    ("5,100,200", "5100200"),
    ("1234,567", "567"),
    ("It costs ₹1,00,000.", "100000"),
    ("₹1,00,000 in all", "100000"),
    ("5'6", "6"),
    ("'18'", "18"),
    ("1.234.567", "1234567"),
    ("1.234", "617/500"),
    ("1.234.56", "56"),
    ("so...5", "5"),
    ("3 100", "100"),
    ("答案是18。", "18"),
    ("\uff11\uff18", "18"),
    ("3\\times10", "10"),
    (r"\frac{3}{4} \times 24 = 18", "18"),
    ("half of 1/2 is 1/4", "1/4"),
    ("1½ cups", "3/2"),
    ("2 1/2 hours", "5/2"),
    ("5/0", INVALID),
    # Names keep their digits.
    ("18 of CO2", "18"),
    ("18 = x1", "18"),
    # Scientific notation, and what only looks like it.
    ("1e5", "100000"),
    ("1.5e+3", "1500"),
    ("5 eggs", "5"),
    ("2e", "2"),
    # Headings, and the instruction itself.
    ("#### Step 3", "3"),
    ("#### 3. Total", "3"),
    ("#### 3) **Total** is 18", "18"),
    ("### 18", "18"),
    ("##### 18", "18"),
    ("####\n18", "18"),
    ("#### x = 18", "18"),
    (r"Please put your final answer within \boxed{}.", INVALID),
    ('Please end with a line "#### <number>".', INVALID),
    ("18. End with #### <number>", "18"),
    (r"\boxed 18", "18"),
    # One box, several numbers: no answer by the mark.
    (r"\boxed{3 \text{ and } 4}", "4"),
    (r"\boxed{3, 4}", "4"),
    (r"\boxed{10-5}", "5"),
    (r"\boxed{9+9}", "9"),
    (r"\boxed{3} and then \boxed{4 \text{ or } 5}", "5"),
    (r"\boxed{5:30}", "30"),
    (r"\boxed{2^3}", "3"),
]


@pytest.mark.parametrize(("response", "number"), MARKED)
def test_a_marked_answer(response: str, number: str) -> None:
    assert strict_match(response) == number
    assert flexible_extract(response) == number


@pytest.mark.parametrize(("response", "number"), UNMARKED)
def test_without_a_marked_answer(response: str, number: str) -> None:
    assert strict_match(response) == INVALID
    assert flexible_extract(response) == number


QUESTION = "Ann has 3 hens, each lays 6 eggs.  How many eggs?"


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        (QUESTION, INVALID, INVALID),
        (f"{QUESTION}\n\nPlease put your final answer within \\boxed{{}}.", INVALID, INVALID),
        (f"{QUESTION} {QUESTION}", INVALID, INVALID),
        (f"18. {QUESTION}", INVALID, "18"),
        (f"\\boxed{{18}}\n{QUESTION}", "18", "18"),
        ("Ann has 3 hens.", INVALID, "3"),  # in the model's own words
    ],
)
def test_a_copy_of_the_question_is_no_answer(response: str, strict: str, flexible: str) -> None:
    assert strict_match(response, QUESTION) == strict
    assert flexible_extract(response, QUESTION) == flexible
    assert flexible_extract(response, f" {QUESTION}\n") == flexible


def test_without_a_question_nothing_is_removed() -> None:
    assert flexible_extract("18", "") == flexible_extract("18", " ") == "18"


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("3 * 6 = <<3*6=18>>18\n#### 18", "18"),
        ("#### 1,450,000", "1450000"),
        ("#### -10", "-10"),
        ("#### 3\n#### 4\n", "4"),
        ("#### 0.5", "1/2"),
        ("18", INVALID),
        ("#### ", INVALID),
        ("#### eighteen", INVALID),
        (r"\boxed{18}", INVALID),
    ],
)
def test_gold(answer: str, number: str) -> None:
    assert gold_number(answer) == number


def test_long_numbers() -> None:
    longest = "9" * MAX_CHARACTERS
    assert strict_match(rf"\boxed{{{longest}}}") == longest
    # A run of digits up to the length limit is still the last thing said: the 18 before it is not the answer.
    assert strict_match(rf"\boxed{{18}} \boxed{{{longest}9}}") == INVALID
    assert flexible_extract(f"18, {longest}9") == INVALID
    assert strict_match(r"\boxed{9e999}") == "9" + "0" * 999
    assert strict_match(r"\boxed{99e999}") == INVALID
    assert strict_match(r"\boxed{1e-999}") == INVALID


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "\\boxed{" * 20_000 + "}" * 20_000,
        "\\boxed{" + "3=" * 20_000,
        "\\boxed{" + "=- " * 20_000,
        "#### " + "=" * 100_000,
        "#### 18. " + "*" * 100_000 + "\n#### 18. " + " " * 100_000,
        "####" * 30_000,
        "1" * 200_000,
        "1,000," * 20_000,
        "1 1/" * 20_000,
        "$" * 100_000,
        "- " * 50_000,
        "\\frac{1}{" * 10_000,
        "\\text{x^{_{" * 10_000,
    ],
    ids=lambda text: text[:12],
)
def test_repetitive_text_takes_linear_time(text: str) -> None:
    start = time.perf_counter()
    strict_match(text)
    flexible_extract(text)
    # Each takes about 0.3 s or less; what is quadratic takes a minute.
    assert time.perf_counter() - start < 10


patiently = settings(deadline=None)  # a busy machine is no failure

FORMATS = [
    "#### {}",
    "#### ${}.",
    "#### **{}**",
    "#### {} eggs",
    r"\boxed{{{}}}",
    r"$\boxed{{{}}}$.",
    r"\boxed{{\${}}}",
    r"\boxed{{{} \text{{ dollars}}}}",
    r"\boxed{{\text{{{}}}}}",
    r"\boxed{{x = {}}}",
    r"\boxed{{{}",
    r"\boxed{{\boxed{{{}}}}}",
]
UNMARKED_FORMATS = ["{}", "The answer is {}.", "**{}**", "It costs ${}, no more.", "= {} eggs", "({})", "$${}$$"]


def _spellings(value: Fraction) -> list[str]:
    sign, size = ("-" if value < 0 else ""), abs(value)
    spellings = [f"{sign}{size}"]
    if size.denominator == 1:
        whole = int(size)
        spellings += [f"{sign}{whole:,}", f"{sign}{whole}.00", f"{sign}{whole:,}".replace(",", "{,}")]
        spellings += [f"{sign}{whole:,}".replace(",", separator) for separator in ("\\,", "\\ ", ",\\!", "\u202f")]
    else:
        whole, part = divmod(size, 1)
        spellings.append(f"{sign}\\frac{{{size.numerator}}}{{{size.denominator}}}")
        if whole:
            spellings.append(f"{sign}{whole}\\frac{{{part.numerator}}}{{{part.denominator}}}")
    if sign:
        spellings += [spelling.replace("-", "\u2212", 1) for spelling in spellings]
    return spellings


NUMBERS = st.one_of(
    st.integers(-(10**12), 10**12).map(Fraction),
    st.fractions(min_value=-1000, max_value=1000, max_denominator=50),
)


@patiently
@given(NUMBERS, st.sampled_from(FORMATS), st.data())
def test_every_spelling_of_a_marked_number_is_the_same(value: Fraction, form: str, data: st.DataObject) -> None:
    response = "2 + 3 is no answer. " + form.format(data.draw(st.sampled_from(_spellings(value))))
    assert strict_match(response) == flexible_extract(response) == str(value)


@patiently
@given(NUMBERS, st.sampled_from(UNMARKED_FORMATS), st.data())
def test_every_spelling_of_a_last_number_is_the_same(value: Fraction, form: str, data: st.DataObject) -> None:
    response = "2 + 3 is no answer. " + form.format(data.draw(st.sampled_from(_spellings(value))))
    assert strict_match(response) == INVALID
    assert flexible_extract(response) == str(value)


@patiently
@given(st.decimals(min_value=-(10**9), max_value=10**9, places=3))
def test_decimals_are_exact(value: Decimal) -> None:
    assert gold_number(f"#### {value:,f}") == strict_match(rf"\boxed{{{value:f}}}") == str(Fraction(value))


# Text made of what the rules look at meets more of them than random text does.
LATEX = ["\\boxed{", "\\frac", "\\text{", "\\,", "\\", "{,}"]
PIECES = st.sampled_from([*"0123456789.,-−–=/$%^_{}()*#:\n e½", *LATEX, "####", "answer"])
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join))


@patiently
@given(TEXTS, TEXTS)
def test_any_text_gives_a_canonical_number_or_invalid(text: str, question: str) -> None:
    strict, flexible = strict_match(text, question), flexible_extract(text, question)
    for number in (strict, flexible, gold_number(text)):
        assert number == INVALID or number == str(Fraction(number))
    assert strict in (INVALID, flexible)


@patiently
@given(TEXTS)
def test_extracting_again_changes_nothing(text: str) -> None:
    number = flexible_extract(text)
    assert flexible_extract(number) == number
    assert strict_match(f"#### {number}") == strict_match(rf"\boxed{{{number}}}") == number


def test_gsm8k_answers_as_responses(gsm8k: Path) -> None:
    rows = [json.loads(line) for line in (gsm8k / "test.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 1319
    for row in rows:
        question, answer = row["question"], row["answer"]
        reasoning, _, number = answer.rpartition("####")
        number = number.strip()
        gold = gold_number(answer)
        assert gold == number.replace(",", "")
        for response in (
            answer,
            rf"{reasoning}So the answer is \boxed{{{number}}}.",
            rf"{reasoning}\[ \boxed{{\${number.replace(',', '{,}')} \text{{ in all}}}} \]",
            f"{question}\n\nPlease put it within \\boxed{{}}.\n\n{answer}",
        ):
            assert strict_match(response, question) == flexible_extract(response, question) == gold
        assert strict_match(reasoning, question) == INVALID
        assert flexible_extract(f"{reasoning}The answer is **{number}**.", question) == gold


def test_imports_nothing_heavy() -> None:
    code = "import sys, sdar_lm_eval.tasks.extraction; print({'torch', 'lm_eval', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
