"""SDAR on LMDeploy's PyTorch engine.

engine.py         the adapter: groups requests, has LMDeploy made for their settings, hands results on
group.py          requests that may run together, each ended where its answer does
loading.py        LMDeploy's engine in memory
loop.py           the event loop where it lives
checks.py         what is refused
requirements.py   which LMDeploy is installed, what is missing beside it, where its answers deviate
hooks.py          what LMDeploy has to be told beside its public arguments
config.py         config.json as LMDeploy reads it
"""
