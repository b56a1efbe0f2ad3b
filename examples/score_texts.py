"""Score texts: the log-likelihood of each candidate answer to a question.

    python examples/score_texts.py
    python examples/score_texts.py --pretrained JetLM/SDAR-4B-Chat --question "What is France's capital?" Paris Rome

A log-likelihood is in nats. By lm_eval's rule, white space at the prompt's end belongs to the candidate. The share is
the candidate's probability among the candidates. `--plain` leaves out the chat template, so the candidates follow the
question directly. The default likelihood is the probability with which sequential decoding writes the candidate.
`--likelihood nelbo` is the evidence lower bound.
"""

from __future__ import annotations

import argparse
import math

import pandas as pd

from sdar_lm_eval import LoadedModel, load

QUESTION = (
    "There are 4 bags with 38 coins in each. Jack adds 88 coins. How many coins is that?"
    '\n\nPlease reason step by step, and end with a line "#### <number>".'
)
CANDIDATES = ["We get 4 * 38 = 152 coins.", "We get 4 * 38 = 142 coins.", "We get 4 * 88 = 352 coins."]


def in_template(model: LoadedModel, question: str) -> str:
    """Return the prompt that the chat template makes of a question."""
    turns = [{"role": "user", "content": question}]
    prompt = model.checkpoint.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return str(prompt)


def scores_of(model: LoadedModel, prompt: str, candidates: list[str]) -> pd.DataFrame:
    """Return a row for each candidate, the likeliest first."""
    found = model.loglikelihood([(prompt, candidate) for candidate in candidates])
    scores = pd.DataFrame(found, columns=["log_likelihood", "is_greedy"])
    best = scores.log_likelihood.max()
    weights = scores.log_likelihood.map(lambda nats: math.exp(nats - best))
    scores["share"] = weights / weights.sum()
    scores["candidate"] = candidates
    return scores.sort_values("log_likelihood", ascending=False)


def main() -> None:
    """Print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="*", default=CANDIDATES, help="answers to score")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--plain", action="store_true", help="no chat template: the candidates follow the question")
    parser.add_argument("--pretrained", default="demo", help="a checkpoint: a folder, a name on the Hub, or demo")
    parser.add_argument("--likelihood", default="chain", choices=["chain", "nelbo"])
    arguments = parser.parse_args()
    with load(arguments.pretrained, likelihood=arguments.likelihood) as model:
        prompt = arguments.question if arguments.plain else in_template(model, arguments.question)
        scores = scores_of(model, prompt, arguments.candidates)
    print(scores.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
