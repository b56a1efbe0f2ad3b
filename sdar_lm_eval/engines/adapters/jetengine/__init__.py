"""SDAR through JetEngine.

engine.py            the adapter: what JetEngine needs of `adapters/adapter.py`
group.py             requests with like settings, step after step
loading.py           JetEngine's LLM in memory
memory.py            how much memory JetEngine is to take
checks.py            what is refused
versions.py          which JetEngine is installed; the table of how versions differ
hooks.py             what JetEngine needs beside its public arguments
api.py               all that is used of JetEngine, as types
flash_attention.py   whether the installed flash-attn is right
config.py            config.json as JetEngine reads it
"""
