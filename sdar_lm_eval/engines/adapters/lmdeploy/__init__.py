"""SDAR on LMDeploy's PyTorch engine; `engine.py` is where to begin."""
