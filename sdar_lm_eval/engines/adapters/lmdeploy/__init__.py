"""SDAR on LMDeploy's PyTorch engine.

engine.py         the adapter: what LMDeploy needs of `adapters/adapter.py`
group.py          requests that may run together, each ended where its answer ends
loading.py        LMDeploy's engine in memory
loop.py           the event loop that the engine runs in
checks.py         what is refused
versions.py       which LMDeploy is installed, what is missing beside it, and rules that differ from ours
hooks.py          what LMDeploy needs beside its public arguments
api.py            all that is used of LMDeploy, as types
config.py         config.json as LMDeploy reads it
"""
