"""What the adapter refuses, because JetEngine would answer wrongly or fail."""

from __future__ import annotations

from collections.abc import Sequence

from sdar_lm_eval.engines.adapters.config import HEAD_DIMS
from sdar_lm_eval.engines.adapters.jetengine.hooks import tail_of
from sdar_lm_eval.engines.adapters.jetengine.loading import Setup
from sdar_lm_eval.engines.adapters.jetengine.versions import version_with
from sdar_lm_eval.engines.adapters.options import check_tensor_parallel, world_size
from sdar_lm_eval.engines.adapters.requests import Decodes, check_requests
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.engines.types import GenerationRequest
from sdar_lm_eval.errors import UserError, listed


def check_setup(setup: Setup) -> None:
    """Refuse a checkpoint or GPUs that this version of JetEngine cannot run on.

    Raises:
        UserError: says what runs it.
    """
    dialect, checkpoint, config = setup.dialect, setup.checkpoint, setup.config
    version, tensor_parallel = dialect.version, setup.tensor_parallel_size

    def refuse(what: str, use: str = "--model sdar") -> None:
        raise UserError(f"JetEngine {version} cannot run {checkpoint.name!r}: {what}. Use {use}.")

    if checkpoint.is_moe and not dialect.mixture_of_experts:
        use = f"--model sdar or JetEngine {version_with('mixture_of_experts')}"
        refuse("this version takes no mixture-of-experts models", use)
    if checkpoint.is_moe and (config.get("mlp_only_layers") or not config["norm_topk_prob"]):
        refuse(
            "JetEngine takes all layers for sparse and always normalizes the experts' weights; config.json says "
            "otherwise"
        )
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        refuse("JetEngine knows no RoPE scaling")
    if config["head_dim"] not in HEAD_DIMS:
        refuse(
            f"the checkpoint's heads have {config['head_dim']} dimensions; JetEngine's kernels take {listed(HEAD_DIMS)}"
        )
    if not dialect.any_gpu and setup.device.index:
        raise UserError(
            f"device={str(setup.device)!r}: JetEngine {version} takes the first GPUs. Choose others by "
            "CUDA_VISIBLE_DEVICES, and leave out device."
        )
    if tensor_parallel > 1:
        if not dialect.tensor_parallel:
            refuse(
                f"tensor_parallel_size={tensor_parallel}, but it gives the logits to the first process only, "
                "and then draws tokens in all processes, which stops the others",
                "tensor_parallel_size=1",
            )
        width = "moe_intermediate_size" if checkpoint.is_moe else "intermediate_size"
        for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", width):
            if config[name] % tensor_parallel:
                refuse(f"tensor_parallel_size={tensor_parallel} does not divide its {name}={config[name]}")
        check_tensor_parallel(tensor_parallel)
    checkpoint.check_weights()
    if world_size() > 1 and not dialect.several_processes:
        raise UserError(
            f"JetEngine {version} cannot run in several processes: each takes the first GPU and the same port. Use "
            f"JetEngine {version_with('several_processes')}, tensor_parallel_size={world_size()} in one process, or "
            "--model sdar."
        )


def check(requests: Sequence[GenerationRequest], setup: Setup) -> None:
    """Refuse requests that would be answered wrongly, before any of them runs.

    Raises:
        UserError: some request would be.
    """
    named = f"JetEngine {setup.dialect.version}"
    decodes = Decodes(
        engine=named,
        strategies=setup.dialect.strategies,
        block_lengths=ENGINES["jetengine"].block_lengths or (),
        takes="JetEngine takes",
        repetition_penalty=f"{named} has none, or another (it divides probabilities, from half of max_gen_toks on)",
    )
    check_requests(requests, decodes, setup.checkpoint)
    if any(request.repetition is not None for request in requests):
        raise UserError(
            "stop_repetition: JetEngine returns only whole answers, so the adapter cannot end an answer in a loop. "
            "Leave out stop_repetition, or use --model sdar or --model sdar-lmdeploy."
        )
    for number, request in enumerate(requests):
        if setup.checkpoint.mask_token_id in tail_of(request):
            raise UserError(
                f"prompt {number} of {len(requests)} holds the mask token among its last "
                f"{len(tail_of(request))} tokens; JetEngine would replace it. Use --model sdar for this task."
            )
