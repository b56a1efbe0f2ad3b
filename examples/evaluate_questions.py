"""Evaluate a checkpoint on your own questions: a task of lm_eval, made of a file of questions and answers.

    python examples/evaluate_questions.py
    python examples/evaluate_questions.py --questions FILE.jsonl --pretrained JetLM/SDAR-4B-Chat --max_gen_toks 512

Each line of the file is {"question": "…", "answer": "…"}. The model's answer is right if its last number equals
"answer". The same task as a YAML file works with `lm_eval --include_path FOLDER`, with every model of the harness.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lm_eval
import pandas as pd
from lm_eval.tasks import TaskManager

import sdar_lm_eval  # noqa: F401  (makes the model known to lm_eval where Python skips .pth files)

PROMPT = '{{question}}\n\nPlease reason step by step, and end with a line "#### <number>".'


def task_of(questions: Path, max_gen_toks: int) -> dict[str, object]:
    """Return the task, as lm_eval's task files describe one."""
    return {
        "task": "my_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": PROMPT,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": max_gen_toks},
        "filter_list": [
            {
                "name": "last-number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(-?\d+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def main() -> None:
    """Evaluate, and print each question with the model's answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, default=Path(__file__).with_name("questions.jsonl"))
    parser.add_argument("--pretrained", default="demo", help="a checkpoint: a folder, a name on the Hub, or demo")
    parser.add_argument("--model_args", default="", help="more of them: dtype=bfloat16,confidence_threshold=0.9")
    parser.add_argument("--max_gen_toks", type=int, default=128, help="limit of new tokens")
    arguments = parser.parse_args()
    if not arguments.questions.is_file():
        parser.error(f"--questions {arguments.questions} is no file. Give one with a JSON object on each line.")
    results = lm_eval.simple_evaluate(
        model="sdar",
        model_args=",".join(filter(None, [f"pretrained={arguments.pretrained}", arguments.model_args])),
        tasks=[task_of(arguments.questions, arguments.max_gen_toks)],
        task_manager=TaskManager(include_defaults=False),  # lm_eval's own 14,000 task files take seconds to read
        bootstrap_iters=0,
    )
    assert results is not None  # lm_eval returns None on ranks above 0
    samples = pd.DataFrame(
        {
            "question": sample["doc"]["question"],
            "expected": sample["target"],
            "found": sample["filtered_resps"][0],
            "right": bool(sample["exact_match"]),
        }
        for sample in results["samples"]["my_questions"]
    )
    print(samples.to_string(index=False, max_colwidth=60))
    print(f"{samples.right.sum()} of {len(samples)} right")


if __name__ == "__main__":
    main()
