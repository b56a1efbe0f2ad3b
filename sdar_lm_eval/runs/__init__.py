"""Whole benchmark runs on other machines: what is asked for, each machine's part of it, and one result.

    settings.py    a user's flags -> `Run`s (one, or the grid of a sweep) -> the harness call each of them is
    shards.py      a machine's part of a run's documents, answered into a folder (`sdar_lm_eval/lm/answers.py`)
    merge.py       all answers of a run, scored by the harness in one pass; refuses where one is missing
    programs.py    programs that the model wrote, run where the caller says
    summary.py     what is printed: the configuration, the result, a sweep's table

`modal_runner.py` is the one that rents machines. settings.py and summary.py need nothing but the standard library and
run where lm_eval and torch are not installed.
"""
