"""The kernels compile, and fit the shared memory of GPUs. That needs no GPU: Triton brings NVIDIA's assembler."""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import dedent

import pytest

pytest.importorskip("triton")

COMPILE = """
    import os
    import sys

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sdar_lm_eval.engines.native.kernels import attention, drawing, experts, layers

    CAPABILITY, SHARED = map(int, sys.argv[1:])  # compute capability times 10, KiB of a program's shared memory
    BF16, INT32, INT64, FP32 = "*bf16", "*i32", "*i64", "*fp32"


    def fits(kernel, types, constants, **options):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        constants = {(names.index(name),): value for name, value in constants.items()}
        # Addresses and widths are multiples of 16, as in a run: only then are loads copied ahead, to shared memory.
        aligned = [name for name in names if signature[name][0] == "*" or name in ("size", "inputs", "split_size")]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
        return compiled.metadata.shared <= SHARED * 1024


    def check(kernel, *args, **options):
        if CAPABILITY == 90 or kernel in (layers.few_rows_kernel, experts.gate_up_kernel, experts.down_kernel):
            assert fits(kernel, *args, **options), kernel.__name__


    if CAPABILITY != 90:
        os.environ["DISABLE_LLVM_OPT"] = "1"  # LLVM's optimizer takes long, and changes no shared memory


    def tensors(type_, *names):
        return dict.fromkeys(names, type_)


    check(
        layers.add_norm_kernel,
        {**tensors(BF16, "x", "residual", "weight", "out"), "eps": "fp32"},
        {"SPLITS": 1, "ADD": True, "BLOCK": 4096},
    )
    check(
        layers.add_norm_kernel,
        {"x": FP32, **tensors(BF16, "residual", "weight", "out"), "eps": "fp32"},
        {"SPLITS": 4, "ADD": True, "BLOCK": 4096},
        num_warps=16,
    )
    products = [(BF16, BF16, False, 5), (BF16, BF16, True, 3), (BF16, FP32, False, 3), (FP32, FP32, False, 5)]
    for type_, out, gated, stages in [*products, (FP32, FP32, True, 3)]:
        check(
            layers.few_rows_kernel,
            {**tensors(type_, "x", "weight"), "out": out},
            {
                "ROWS": 16, "COLUMNS": 32, "INPUTS": 128, "GATED": gated,
                "PRECISION": "ieee" if type_ == FP32 else "tf32",
            },
            num_warps=4,
            num_stages=stages,
        )
    check(layers.silu_mul_kernel, tensors(BF16, "x", "out"), {"BLOCK": 1024})
    check(
        layers.norm_rope_store_kernel,
        {
            **tensors(BF16, "qkv", "q_weight", "k_weight", "q_out", "keys", "values"),
            **tensors(INT64, "positions", "kv_slots"),
            "cos_sin": FP32,
            "eps": "fp32",
        },
        {"HEADS": 32, "KV_HEADS": 8, "SIZE": 128, "GROUP": 8},
        num_warps=4,
    )
    for type_, size, precision in ((BF16, 2, "tf32"), (FP32, 4, "ieee")):
        check(
            experts.route_kernel,
            {
                "logits": type_, **tensors(INT32, "chosen", "counts"), **tensors(FP32, "weights", "totals"),
                "visible": INT64,
            },
            {"EXPERTS": 128, "COLUMNS": 128, "TOP": 8, "NORMALIZED": True, "MASKED": True, "ROUTED": experts.ROUTED},
            num_warps=1,
        )
        for tile in experts.TILES if size == 2 else [experts.FLOAT32_TILES]:
            constants = {"TOP": 8, "ROWS": tile.rows, "INPUTS": tile.inputs, "PRECISION": precision}
            for kernel, columns in (
                (experts.gate_up_kernel, tile.columns),
                (experts.down_kernel, tile.down_columns),
            ):
                check(
                    kernel,
                    {
                        **tensors(type_, "x", "weight", "out"), **tensors(INT32, "order", "table"),
                        **tensors(FP32, "weights", "totals"),
                    },
                    {**constants, "COLUMNS": columns},
                    num_warps=tile.warps,
                    num_stages=tile.stages,
                )
    check(
        experts.order_kernel,
        tensors(INT32, "chosen", "counts", "taken", "order", "table"),
        {"EXPERTS": 128, "COLUMNS": 128, "TILE": 64, "PLACED": experts.PLACED},
        num_warps=4,
    )
    # Rows of two blocks of 4 or of 8, of a prompt's tile, and of the longest block. Float32 needs the most shared
    # memory. Scoring has pages of one token.
    most = {type_: triton.next_power_of_2(SHARED * 512) // (128 * size) for type_, size in ((BF16, 2), (FP32, 4))}
    shapes = [(BF16, 32, 16, 1, 16, 1), (BF16, 32, 16, 1, 16, 2000), (BF16, 32, 16, 4, 16, 1000)]
    shapes += [(BF16, 64, 32, 1, 16, 1000), *((BF16, most[BF16] // 2, 0, *cut, 1000) for cut in ((1, 16), (2, 1)))]
    longest = [(BF16, most[BF16], 0, 1, 16, 1000), (FP32, most[FP32], 0, 1, 16, 1000)]
    for type_, rows, fewer, splits, page, programs in (*shapes, *longest):
        if type_ == FP32:
            os.environ["DISABLE_LLVM_OPT"] = "1"
        types = {
            **tensors(type_, "query", "keys", "values"),
            **tensors(INT64, "firsts", "counts", "pages", "sequence", "visible"),
            "out": type_ if splits == 1 else FP32,
            "sums": FP32,
            "scale": "fp32",
        }
        constants = {
            "HEADS": 32, "KV_HEADS": 8, "SIZE": 128, "PAGE": page, "ROWS": rows, "FEWER": fewer or rows,
            "PARTIAL": splits > 1, "PRECISION": "ieee" if type_ == FP32 else "tf32",
        }
        settings = attention.attention_settings(rows, programs, 2 if type_ == BF16 else 4)
        fitting = (
            fits(attention.attend_kernel, types, {**constants, "COLUMNS": columns}, num_warps=warps, num_stages=stages)
            for columns, warps, stages in settings
        )
        # On an H100, the first settings fit.
        assert next(fitting) if CAPABILITY == 90 else any(fitting), (type_, rows)
    if CAPABILITY == 90:
        os.environ.pop("DISABLE_LLVM_OPT")
    check(
        attention.combine_splits_kernel,
        {**tensors(FP32, "parts", "sums"), "out": BF16},
        {"SIZE": 128},
        num_warps=1,
    )
    check(
        drawing.summarize_logits_kernel,
        {"logits": BF16, **tensors(FP32, "temperature", "parts")},
        {"BLOCK": 4096, "ENTROPY": True},
    )
    check(
        drawing.choose_token_kernel,
        {
            "logits": BF16,
            "greedy": "*i1",
            "token_out": INT64,
            **tensors(FP32, "temperature", "number", "parts", "confidence_out", "entropy_out"),
        },
        {"BLOCK": 4096, "CHUNKS": 64, "ENTROPY": True},
    )
"""

COMPILE_GLUON = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from sdar_lm_eval.engines.native.kernels import hopper, hopper_attention


    def descriptor(type_, *shape):
        return f"tensordesc<{type_}{list(shape)},{gl.NVMMASharedLayout(128, 16, len(shape))!r}>"


    for type_, parts in [("bf16", 2), ("fp16", 1)]:
        signature = {
            "x": descriptor(type_, hopper.STRIP, hopper.INPUTS),
            "weight": descriptor(type_, parts, hopper.COLUMNS // parts, hopper.INPUTS),
            "out": descriptor(type_, hopper.STRIP, hopper.COLUMNS // 2),
            "work": "*i32", "turns": "i32", "inputs": "i32", "STAGES": "constexpr",
        }
        source = GluonASTSource(fn=hopper.product_kernel, signature=signature, constexprs={(6,): hopper.STAGES})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": 168})
        assert compiled.metadata.shared <= 227 * 1024
        assert "wgmma.mma_async" in compiled.asm["ptx"]

    kernel = hopper_attention.attend_hopper_kernel
    for consumers, size, partial, out in [(1, 128, True, "*fp32"), (2, 128, False, "*bf16"), (2, 64, False, "*bf16")]:
        pages = descriptor("bf16", 16, hopper_attention.CHANNELS)
        columns = hopper_attention.COLUMNS[consumers]
        constants = {
            "HEADS": 32, "KV_HEADS": 8, "SIZE": size, "ROWS": hopper_attention.ROWS, "COLUMNS": columns,
            "STAGES": hopper_attention.STAGES, "CONSUMERS": consumers, "PARTIAL": partial,
        }
        types = {"query": "*bf16", "keys": pages, "values": pages, "out": out, "sums": "*fp32", "scale": "fp32"}
        types |= dict.fromkeys(["firsts", "counts", "pages", "sequence", "visible"], "*i64")
        names = kernel.arg_names
        source = GluonASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
        options = {"num_warps": 4, "maxnreg": hopper_attention.REGISTERS[consumers]}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        programs = 3 - consumers  # programs that run at once on a multiprocessor
        # A multiprocessor has 228 KiB of shared memory, and reserves 1 KiB for each program.
        assert programs * (compiled.metadata.shared + 1024) <= 228 * 1024
        assert "wgmma.mma_async" in compiled.asm["ptx"]
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize(
    ("script", "gpu"),
    [
        *[(COMPILE, (90, 227)), (COMPILE_GLUON, (90, 227))],
        *[(COMPILE, gpu) for gpu in ((80, 163), (89, 99), (100, 227), (120, 99))],
    ],
    ids=["triton", "gluon", "A100", "L40S", "B200", "RTX 5090"],
)
def test_for_gpus(tmp_path, pytestconfig, script, gpu):
    if script is COMPILE_GLUON:
        pytest.importorskip("sdar_lm_eval.engines.native.kernels.hopper", exc_type=ImportError)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Triton's cache has kernels by source, version and settings, so unchanged kernels are not compiled again.
    cache = getattr(pytestconfig, "cache", None)  # None if pytest runs without its cache
    environment["TRITON_CACHE_DIR"] = str(cache.mkdir("kernels") if cache else tmp_path)
    file = tmp_path / "compile.py"
    file.write_text(dedent(script))
    done = subprocess.run(
        [sys.executable, file, *map(str, gpu)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if script is COMPILE:
        assert "Warning" not in done.stderr
