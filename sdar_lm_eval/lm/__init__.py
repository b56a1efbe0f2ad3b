"""The lm_eval model: the harness's requests, answered by an engine.

model.py         SDARLM: the methods that the harness calls
frontend.py      the checkpoint and what makes an engine's requests, which load() has in common with SDARLM
rounds.py        a round of requests: stored answers are found, the others are computed
hooks.py         wrappers around lm_eval's functions, by which models learn of evaluations
task_methods.py  replacements of a task's methods, by which models learn of tasks, documents and chat templates
watched.py       what a model is told of its evaluations
task_requests.py what lm_eval knows of a task's requests: its name, documents, chat template, published decoding
evaluation.py    the state of an evaluation: each request's task, and the account
account.py       what a rank did in an evaluation: counts, settings, prompts, thoughts; ranks send it to rank 0
prompts.py       text -> tokens: chat template, special tokens, pairs of context and continuation
jobs.py          harness requests -> engine requests with seeds and keys
likelihoods.py   harness requests for log-likelihoods -> score requests, and the sums of their results
store.py         finished answers under one key, in the harness's cache, a folder, or both
answers.py       the format of the folder of finished answers
denoising.py     denoising records of an evaluation
thoughts.py      settings of thoughts, and the checkpoint's think end
facts.py         the description of a model in the log, results file, trace and stored answers
ranks.py         data parallel processes
"""
