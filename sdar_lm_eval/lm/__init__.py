"""The lm_eval model: what the harness asks for, on top of an engine.

model.py         SDARLM: what the harness calls
rounds.py        a round of requests: finds what is stored, computes the rest
evaluation.py    what lm_eval does not tell its models: which evaluation, task and document a request belongs to
prompts.py       text -> tokens: chat template, special tokens, pairs of context and continuation
jobs.py          harness requests -> engine requests with seeds and keys
likelihoods.py   harness requests for log-likelihoods -> score requests, and the sums of their results
store.py         finished answers: one key, kept in the harness's cache, a folder, or both
answers.py       the folder's format
facts.py         what log, results file, trace and stored answers say of a model
ranks.py         data parallel processes
"""
