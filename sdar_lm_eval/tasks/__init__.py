"""lm-eval tasks: YAML files, and the functions that they name. docs/tasks.md says what each reproduces.

A benchmark's module has its data, prompts, filters and scores:

    gsm8k.py, math500.py, competitions.py, trado.py, mathbench.py      mathematics
    mmlu.py, lettered.py                                               questions with lettered options
    humaneval.py, mbpp.py, livecodebench.py                            programs
    ifeval.py, parallel_bench.py                                       instructions; what parallel decoding loses

They share:

    data.py                        where documents come from, and checks of their rows
    extraction.py                  GSM8K's rule: the number that a response gives
    opencompass_math.py            the rule of SDAR's evaluation for mathematics
    dllm_rl_math.py                the rule of dLLM-RL
    latex.py                       what these rules have in common
    first_option.py                the letter that a response chooses
    thoughts.py                    responses without their thoughts
    repeated.py, set_score.py      metrics of a document's several answers; MathBench's scores, which know their stage
    rounds.py                      few-shot prompts as rounds of a conversation
    programs.py, program_child.py  run programs of the model; the process that a program runs in
    livecodebench_tests.py, livecodebench_child.py    LiveCodeBench's tests; how a program runs on them
    generated/                     documents that are generated from a seed
"""
