"""SDAR through JetEngine.

engine.py            the adapter: groups requests, loads JetEngine, hands results on
group.py             requests with like settings, step after step
loading.py           JetEngine's LLM in memory
memory.py            how much memory that is to take
checks.py            what is refused
versions.py          which JetEngine is installed; the table of all in which versions differ
hooks.py             what JetEngine has to be told beside its public arguments
flash_attention.py   whether the installed flash-attn is right
config.py            config.json as JetEngine reads it
"""
