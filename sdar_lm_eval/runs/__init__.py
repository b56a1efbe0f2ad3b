"""Whole benchmark runs on other machines: the flags, each machine's share of the documents, and one result.

    settings.py    a user's flags -> `Run`s (one, or the grid of a sweep) -> each run's call of the harness
    shards.py      answers a machine's share of a run's documents, into a folder (`sdar_lm_eval/lm/answers.py`)
    merge.py       scores all answers of a run in one pass of the harness; refuses a run with missing answers
    programs.py    runs programs that the model wrote where the caller chooses
    summary.py     what is printed: the configuration, the result, a sweep's table

`modal_runner.py` rents the machines. settings.py and summary.py need nothing but the standard library, so they run
where lm_eval and torch are not installed.
"""
