"""Whole benchmark runs: grids of decoding settings, here or on other machines; documents shared by several machines.

    grid.py        texts such as "0.5:0.99" -> values -> combinations of decoding settings
    plan.py        a sweep on this machine: its evaluations, checked before any runs
    earlier.py     an evaluation of a sweep, and results of earlier sweeps in its folder
    local.py       runs them: the weights are loaded once, each combination is a resumable run
    flags.py       the flags of modal_runner.py: their meaning, and flags that are no setting of a run
    settings.py    a user's flags -> the settings of each run (one run, or a sweep's) -> each run's call of the harness
    shards.py      answers a machine's share of a run's documents, into a folder (`sdar_lm_eval/lm/answers.py`)
    saving.py      an evaluation by the harness -> a folder of results and samples files
    merge.py       scores all answers of a run in one pass of the harness; refuses a run with missing answers
    programs.py    runs programs that the model wrote where the caller chooses
    summary.py     what is printed: the configuration, the result, a sweep's table

`modal_runner.py` rents the machines. flags.py, grid.py, settings.py and summary.py need nothing but the standard
library, so they run where lm_eval and torch are not installed.
"""
