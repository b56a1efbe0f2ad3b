"""Opens a checkpoint of the SDAR family without running its code.

SDAR's folders name Python files in `auto_map`. Without this package, transformers runs these files, or waits for a "y"
on a terminal. The files are not needed: SDAR is Qwen3 (SDAR MoE is Qwen3-MoE) under a block-causal mask, with Qwen3's
weight names and shapes, so transformers' own classes load SDAR's weights. This package reads `config.json` as data.

transformers and other engines open a temporary folder in the place of the checkpoint's folder. The temporary folder has
a copy of the tokenizer's files without `auto_map`, and links to the safetensors. The package compares the safetensors'
names and shapes with `config.json` first. No `.py` file is ever copied or downloaded.

    checkpoint.py    what the checkpoint says of itself, and what engines get of it
    folder.py        name -> folder, the hub
    config.py        config.json: each value checked; transformers' config
    weights.py       files, headers, names and shapes; loading
    tokenizer.py     a clean copy, opened and checked
    fingerprint.py   a hash of all files
"""

from sdar_lm_eval.checkpoint.checkpoint import DTYPES, Checkpoint

__all__ = ["DTYPES", "Checkpoint"]
