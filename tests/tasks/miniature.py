"""Small data of our own in the columns of each data set of SDAR's table, and how a model might answer it."""

from __future__ import annotations

import base64
import csv
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripted import TASKS

from sdar_lm_eval.tasks.mathbench import PARTS

SUBJECTS = sorted(file.stem.removeprefix("mmlu_sdar_") for file in (TASKS / "mmlu_subjects").glob("*.yaml"))

Row = dict[str, Any]

GSM8K: list[Row] = [
    {"question": "Ann has 3 hens, each lays 6 eggs. How many eggs?", "answer": "3 * 6 = 18\n#### 18"},
    {"question": "Bo earns $500 twice. How much?", "answer": "2 * 500\n#### 1,000"},
]
MATH500: list[Row] = [
    {
        "problem": "Find all $x$ with $2x + 3 = 13$.",
        "solution": "$2x = 10$, so $x = \\boxed{5}$.",
        "answer": "5",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/1.json",
    },
    {
        "problem": "Half of\n\\[\\frac{1}{3}\\]is what?",
        "solution": "$\\boxed{\\frac{1}{6}}$",
        "answer": "\\frac{1}{6}",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": "test/prealgebra/2.json",
    },
]
HUMANEVAL: list[Row] = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """ Sum of numbers.\n    """\n',
        "canonical_solution": "    return sum(xs)\n",
        "test": "\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
        "entry_point": "total",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": '\n\ndef shout(text: str) -> str:\n    """Upper case."""\n',
        "canonical_solution": "    return text.upper()\n",
        "test": 'def check(candidate):\n    assert candidate("a") == "A"\n',
        "entry_point": "shout",
    },
]
MBPP: list[Row] = [
    {
        "source_file": "ours",
        "task_id": 11,
        "prompt": "Write a function that doubles.",
        "code": "def double(x):\n    return 2 * x",
        "test_imports": [],
        "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
    },
    {
        "source_file": "ours",
        "task_id": 12,
        "prompt": "Write a function to check whether a number is even.",
        "code": "def check(n):\n    return n % 2 == 0",
        "test_imports": [],
        "test_list": ["assert check(2) == True", "assert check(3) == False"],
    },
]
IFEVAL: list[Row] = [
    {
        "key": 1000,
        "prompt": "Write about rain. Use no commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_highlights": None, "keywords": None}],
    },
    {
        "key": 1001,
        "prompt": 'Write two sentences or more, in which "rain" and "roof" occur.',
        "instruction_id_list": ["keywords:existence", "length_constraints:number_sentences"],
        "kwargs": [
            {"keywords": ["rain", "roof"], "num_sentences": None, "relation": None},
            {"keywords": None, "num_sentences": 2, "relation": "at least"},
        ],
    },
]

# The right option stands at A, B, C and D; the questions have white space that the prompt leaves out.
MATHBENCH_CHOICE: list[Row] = [
    {"question": f" 1 + {right} = ____?\n", "options": ["1", "$2$", "3 ", "{4}"], "answer": "ABCD"[right]}
    for right in range(4)
]
MATHBENCH_CLOZE: list[Row] = [
    {"question": "小明有3个苹果，又买了2个。一共多少个？ ", "answer": " 5"},
    {"question": "What is {half} of $\\frac{1}{2}$?", "answer": "\\frac{1}{4}"},
]

AIME2024: list[Row] = [
    {
        "id": 60,
        "problem": "Find $s$ so that\n$4s = 12$.",
        "solution": "$\\boxed{003}$",
        "answer": "003",
        "year": "2024",
    },
    {"id": 61, "problem": "Find the sum of all primes below 30.", "solution": "…", "answer": "129", "year": "2024"},
]
AIME2025: list[Row] = [
    {"question": "What is $7 \\cdot 10$? ", "answer": "70"},
    {"question": "Seven arcs measure $48^\\circ$ each. What is their sum, in degrees?", "answer": "336^\\circ"},
]
LIVEMATHBENCH: list[Row] = [{"question": "求$x^2=2$的正根。", "answer": "$\\sqrt{2}$", "question_type": "问答"}]
# Right options that stand at each letter in turn, one of them twice among the options, and a comma and a line break.
GPQA: list[Row] = [
    {
        "Record ID": f"rec{number}",
        "Question": f'Which planet is number {number},\nor "closest"?',
        "Correct Answer": right,
        "Incorrect Answer 1": "Ceres",
        "Incorrect Answer 2": "Pluto, really" if number != 3 else "Ceres",
        "Incorrect Answer 3": "Sedna\n",
    }
    for number, right in enumerate(["Mercury", "Venus", "Earth", "Mars", "Jupiter"])
]
MMLU_PRO: list[Row] = [
    {
        "question_id": 10 * number + place,
        "question": f" Is {{this}} of {category}?\nSay so. ",
        "options": ["no", "N/A", " yes", "I. II. "][: 4 - place] + ["never"] * place,
        "answer": "CAC"[place],
        "answer_index": "ABC".index("CAC"[place]),
        "cot_content": "",
        "category": category,
        "src": "ours",
    }
    for number, category in enumerate(
        ["biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history", "law",
         "math", "other", "philosophy", "physics", "psychology"]
    )
    for place in range(2)
]  # fmt: skip
PROTEINLMBENCH: list[Row] = [
    {
        "question": "Which domain binds?",
        "options": ["option 1: KH1", "option 2: two layers: an outer: and an inner", "option 3: none "],
        "answer": "option 2",
        "explanation": "…",
    },
    {
        "question": "What folds\nfirst?",
        "options": [f"option {number}: helix {number}" for number in range(1, 7)],
        "answer": "option 6",
        "explanation": "…",
    },
]

_PRIVATE = [{"input": "3\n", "output": "6\n", "testtype": "stdin"}]
LIVECODEBENCH: list[Row] = [
    {
        "question_title": "Twice",
        "question_content": "Print twice the number {n}.\n\nSample: 1 -> 2",
        "question_id": "ours_a",
        "starter_code": "",
        "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(_PRIVATE)))).decode(),
        "metadata": "{}",
        "solution": "import sys\nn = int(sys.stdin.readline())\nprint(2 * n)",
    },
    {
        "question_title": "Pairs",
        "question_content": "Return both numbers, the smaller one first.",
        "question_id": "ours_b",
        "starter_code": "class Solution:\n    def pair(self, a: int, b: List[int]) -> List[int]:\n        ",
        "public_test_cases": json.dumps([{"input": "2\n[1]", "output": "[1, 2]", "testtype": "functional"}]),
        "private_test_cases": json.dumps([{"input": "2\n[3]", "output": "[2, 3]", "testtype": "functional"}]),
        "metadata": '{"func_name": "pair"}',
        "solution": "class Solution:\n    def pair(self, a, b: List[int]):\n        return tuple(sorted([a, *b]))",
    },
]


def mmlu(subject: str, split: str) -> list[Row]:
    """Rows of a subject: the answers of `test` are B, C; those of `dev` A, B, C, D, A."""
    return [
        {
            "question": f"{split} {number} of {subject}?",
            "subject": subject,
            "choices": [f"one {number}", "two", "three", "four"],
            "answer": answer,
        }
        for number, answer in enumerate([1, 2] if split == "test" else [0, 1, 2, 3, 0, 1])
    ]


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def write_gpqa(file: Path) -> Path:
    """Write GPQA's file: 12 columns, of which the first 7 are others', in the authors' order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = [
        "Pre-Revision Question",
        *(f"Pre-Revision {name}" for name in ("1", "2", "3", "4")),
        "Explanation",
        "Note",
    ]
    columns += ["Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)), "Record ID"]
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, columns, restval="old")
        writer.writeheader()
        writer.writerows(GPQA)
    return file


def write_all(root: Path) -> Path:
    """Make `root` what `SDAR_DATA_DIR` names, and return it."""
    write_jsonl(root / "gsm8k" / "test.jsonl", GSM8K)
    write_jsonl(root / "math500" / "test.jsonl", MATH500)
    write_jsonl(root / "humaneval" / "HumanEval.jsonl", HUMANEVAL)
    write_jsonl(root / "mbpp" / "test.jsonl", MBPP)
    write_jsonl(root / "ifeval" / "ifeval_input_data.jsonl", IFEVAL)
    for part in PARTS.values():
        for stage, sets in part.items():
            for name in sets:
                rows = MATHBENCH_CLOZE if "cloze" in name else MATHBENCH_CHOICE
                write_jsonl(root / "mathbench" / stage / f"{name}.jsonl", rows)
    write_jsonl(root / "aime2024" / "test.jsonl", AIME2024)
    write_jsonl(root / "aime2025" / "test.jsonl", AIME2025)
    for language in ("cn", "en"):
        write_jsonl(root / "livemathbench" / f"v202412_hard_{language}.jsonl", LIVEMATHBENCH)
    write_jsonl(root / "mmlu_pro" / "test.jsonl", MMLU_PRO)
    write_jsonl(root / "proteinlmbench" / "train.jsonl", PROTEINLMBENCH)
    for version in (5, 6):
        write_jsonl(root / "livecodebench" / f"test{version}.jsonl", LIVECODEBENCH)
    write_gpqa(root / "gpqa" / "gpqa_diamond.csv")
    for subject in SUBJECTS:
        for split in ("dev", "test"):
            write_jsonl(root / "mmlu" / subject / f"{split}.jsonl", mmlu(subject, split))
    return root


def write_punkt(root: Path) -> Path:
    """Make `root` a folder for NLTK_DATA with nltk's sentence splitter, knowing nothing of English, and return it."""
    folder = root / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (folder / name).touch()
    return root
