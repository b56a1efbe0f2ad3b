"""What the adapter refuses, because LMDeploy would answer wrongly or fail."""

from __future__ import annotations

from sdar_lm_eval.checkpoint import Checkpoint
from sdar_lm_eval.engines.adapters.config import HEAD_DIMS
from sdar_lm_eval.engines.adapters.options import check_tensor_parallel, world_size
from sdar_lm_eval.engines.adapters.requests import Decodes
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.engines.runs import check_rope
from sdar_lm_eval.errors import UserError, listed

SPEC = ENGINES["lmdeploy"]
DECODES = Decodes(
    engine="LMDeploy",
    strategies=SPEC.strategies or (),
    block_lengths=SPEC.block_lengths or (),
    takes="with LMDeploy it can be",
    # strategies/ar/sampling.py: _gather_generated_ids
    repetition_penalty="LMDeploy counts the answer's tokens alone, not the prompt's, and mixes up the values of "
    "requests that run together",
)


def check_gpus(checkpoint: Checkpoint, device: str, tensor_parallel: int, data_parallel_size: int) -> None:
    """Refuse more GPUs than there are, and GPUs among which LMDeploy would divide the model wrongly.

    Args:
        checkpoint: the opened checkpoint.
        device: the user's name of the device.
        tensor_parallel: GPUs that share the weights.
        data_parallel_size: copies of the model.

    Raises:
        UserError: says what can be done.
    """
    ranks = world_size()
    if data_parallel_size not in (1, ranks):
        raise UserError(
            f"data_parallel_size={data_parallel_size}, but {ranks} process(es) run. Give each copy of the model a "
            f"process: accelerate launch --multi_gpu --num_processes {data_parallel_size} -m lm_eval …"
        )
    if tensor_parallel == 1:
        return
    if ranks > 1:
        raise UserError(
            f"tensor_parallel_size={tensor_parallel} in {ranks} processes: each would take the same GPUs. Use one "
            "process, or tensor_parallel_size=1."
        )
    check_tensor_parallel(tensor_parallel)
    if device not in ("auto", "cuda"):
        raise UserError(
            f"device={device!r} with tensor_parallel_size={tensor_parallel}: LMDeploy takes the first GPUs. Choose "
            "others by CUDA_VISIBLE_DEVICES, and leave out device."
        )
    config = checkpoint.full_config()
    for name in ("num_attention_heads", "num_key_value_heads", "moe_intermediate_size", "intermediate_size"):
        value = config.get(name)
        if name == "num_key_value_heads" and value and tensor_parallel % value == 0:
            continue  # each GPU has one key-value head, some of them the same one
        if value and value % tensor_parallel:
            raise UserError(
                f"tensor_parallel_size={tensor_parallel} does not divide {name}={value} of checkpoint "
                f"{checkpoint.name!r}. Choose a number that does."
            )


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that LMDeploy would run wrongly, or not at all.

    Raises:
        UserError: says what runs it.
    """
    check_rope(checkpoint)
    config = checkpoint.full_config()

    def refuse(what: str) -> None:
        raise UserError(f"LMDeploy cannot run {checkpoint.name!r}: {what}. Use --model sdar.")

    if config["hidden_act"] != "silu":  # models/sdar.py: SDARMLP
        refuse(f"its hidden_act is {config['hidden_act']!r}; LMDeploy takes silu for all")
    if config["head_dim"] not in HEAD_DIMS:
        refuse(f"its heads have {config['head_dim']} dimensions; tried are {listed(HEAD_DIMS)}")
    checkpoint.check_weights()
