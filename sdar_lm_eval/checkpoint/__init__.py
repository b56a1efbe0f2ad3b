"""Opens a checkpoint of the SDAR family without running its code.

SDAR's folders name Python files in `auto_map`; opening them the usual way runs those files or waits for a "y" on a
terminal. They are not needed: SDAR is Qwen3 (its MoE: Qwen3-MoE) under a block-causal mask, with Qwen3's weight names
and shapes, so transformers' own classes hold it. Here `config.json` is read as data. Nobody else sees the folder:
transformers and other engines get temporary ones, with a copy of the tokenizer's files without `auto_map`, and links to
the safetensors, whose names and shapes have been compared with `config.json` by then. No `.py` file is ever copied or
downloaded.

    checkpoint.py    what it says of itself, and what engines get of it
    folder.py        name -> folder, the hub
    config.py        config.json: each value checked; transformers' config
    weights.py       files, headers, names and shapes; loading
    tokenizer.py     a clean copy, opened and checked
    fingerprint.py   a hash of all of it
"""

from sdar_lm_eval.checkpoint.checkpoint import DTYPES, Checkpoint

__all__ = ["DTYPES", "Checkpoint"]
