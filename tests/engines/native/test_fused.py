"""The engine with the fused decoder and the Triton kernels, compared with transformers' modules.

The kernels run on the CPU through Triton's interpreter, in float32.
"""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from asking import run
from support import random_checkpoint

pytest.importorskip("triton")

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, UserError, make_engine
from sdar_lm_eval.engines.native import engine as native_engine
from sdar_lm_eval.engines.native import unmasking
from sdar_lm_eval.engines.native.forward import choices, decoder, fused, graphs, timings
from sdar_lm_eval.engines.native.forward.modules import ModulesForward
from sdar_lm_eval.engines.native.kernels import attention
from sdar_lm_eval.engines.native.scoring import batches
from sdar_lm_eval.engines.native.scoring import fused as scoring_fused
from sdar_lm_eval.engines.native.scoring.batches import Limits
from sdar_lm_eval.engines.native.scoring.scoring import rows_forward
from sdar_lm_eval.engines.types import LikelihoodConfig, ScoreRequest
from sdar_lm_eval.errors import EngineError

REPRODUCIBLE_ROWS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint.open(str(random_checkpoint(tmp_path_factory.mktemp("fused"), head_dim=64, num_hidden_layers=1)))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A dense layer, and one of experts; the fewer heads, the fewer programs the interpreter runs."""
    folder = tmp_path_factory.mktemp("experts")
    heads = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings = {"moe": True, "num_hidden_layers": 2, "mlp_only_layers": [0], **heads}
    return Checkpoint.open(str(random_checkpoint(folder, **settings)))


@pytest.fixture(params=["dense", pytest.param("experts", marks=pytest.mark.slow)])
def either(request, checkpoint):
    return checkpoint if request.param == "dense" else request.getfixturevalue("experts")


def engine_with_kernels(checkpoint, **options):
    engine = make_engine("native", checkpoint, device="cpu", kernels=True, **options)
    assert engine.runner.forward.captures
    return engine


def test_the_same_tokens(either, monkeypatch):
    monkeypatch.setattr(attention, "SPLIT", 8)  # so that contexts are split
    monkeypatch.setattr(fused, "PREFILL_ROWS", 16)
    monkeypatch.setattr(choices, "LARGE", 1)  # so that products of few rows have their own kernel
    settings = [
        {"temperature": 0, "remasking_strategy": "low_confidence_static", "block_length": 2},
        {"temperature": 1.0, "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.3},
        {"temperature": 0.7, "remasking_strategy": "entropy_bounded", "eb_threshold": 3.0},
        {"temperature": 0, "remasking_strategy": "random", "denoising_steps": 3},
    ]
    requests = [
        GenerationRequest(tuple(range(1, 4 + 2 * i)), 4, DecodingConfig(**s), seed=i) for i, s in enumerate(settings)
    ]
    plain = run(make_engine("native", either, device="cpu"), requests)
    engine = engine_with_kernels(either, max_active=3)
    engine.steps_in_flight = 2  # as on a GPU
    assert [r.token_ids for r in run(engine, requests)] == [r.token_ids for r in plain]


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("on_hopper", [False, True])
def test_attention_of_prompts_is_compiled_ahead(checkpoint, monkeypatch, reproducible, on_hopper):
    """Partial results are another variant of the kernel, and so is each size of tiles.

    On Hopper GPUs, prompts that see few tokens and prompts that see many have different kernels.
    """
    monkeypatch.setattr(attention, "SPLIT", 8)
    monkeypatch.setattr(graphs, "REPRODUCIBLE_ROWS", REPRODUCIBLE_ROWS)
    launched, attend = set(), attention.attend

    def kernel(name):
        def keep(query, keys, values, tiles, scaling):
            launched.add((name, tiles.tokens, tiles.splits > 1))
            return attend(query, keys, values, tiles, scaling)

        return keep

    hopper = types.SimpleNamespace(
        attend=kernel("hopper"),
        runs=lambda heads, cache: on_hopper,
        suits=lambda tiles, *_: tiles.batch_invariant or tiles.split * tiles.splits > 8 or len(tiles.first) > 30,
    )
    monkeypatch.setattr(decoder, "hopper_attention", hopper)
    monkeypatch.setattr(fused, "multiprocessors", lambda: 4)
    monkeypatch.setattr(attention, "attend", kernel("triton"))
    engine = engine_with_kernels(checkpoint, reproducible=reproducible)
    requests = [GenerationRequest(tuple(range(n)), 1, DecodingConfig()) for n in (20, 5)]
    run(engine, requests[1:])  # allocates memory
    launched.clear()
    engine.runner.forward.compile(24)
    compiled = set(launched)
    if on_hopper:  # a forward of many prompts that see few tokens
        assert ("hopper", 4 if reproducible else engine.runner.forward.prefill_tile, False) in compiled
    prefill, prefilled = type(engine.runner.forward).prefill, set()

    def of_prompts(self, chunks):
        launched.clear()
        prefill(self, chunks)
        prefilled.update(launched)

    monkeypatch.setattr(type(engine.runner.forward), "prefill", of_prompts)
    run(engine, requests)
    run(engine, requests[1:])  # a forward whose tokens see few tokens
    assert prefilled and prefilled <= compiled
    assert len({name for name, _, _ in prefilled}) == 1 + (on_hopper and not reproducible)
    launched.clear()
    engine.runner.forward.compile(8)
    assert {partial for _, _, partial in launched} == {False}  # a short context has no splits


def test_all_chosen_tiles_of_experts_are_compiled_ahead(experts):
    """Each with and without padding. Float32, as here, has one choice of tiles only, so the kernels are fakes."""
    made, ran = engine_with_kernels(experts).runner.forward.decoder, set()

    def kernel(name):
        return choices.Kernel(name, lambda x, logits, mlp, visible: ran.add((name, x.shape, logits.shape, visible)))

    made.choices["experts"] = choices.Choice({8: kernel("few"), choices.ANY: kernel("many")}, [kernel("not chosen")])
    made.compile([])
    mlp = made._weights.layers[1].mlp
    shapes = (1, mlp.router.shape[1]), (1, len(mlp.router))
    assert {(name, *its) for name, *its, _ in ran} == {(name, *shapes) for name in ("few", "many")}
    for name in ("few", "many"):
        paddings = [visible for own, _, _, visible in ran if own == name]
        assert [None if visible is None else visible.tolist() for visible in paddings].count(None) == 1
        assert [visible.tolist() for visible in paddings if visible is not None] == [[0]]


@pytest.mark.parametrize(("method", "length"), [("chain", 4), ("nelbo", 3)])
def test_kernels_and_modules_give_the_same_scores(either, monkeypatch, method, length):
    """Texts behind one token, continuations of one context, and alike contexts that share a prefix."""
    on = Limits.on
    narrow = {"row_tokens": 16, "clean_row_tokens": 12, "forward_tokens": 40, "least_saved": 0}
    monkeypatch.setattr(Limits, "on", lambda *args, **kwargs: dataclasses.replace(on(*args, **kwargs), **narrow))
    monkeypatch.setattr(batches, "ALIKE", 4)
    monkeypatch.setattr(attention, "SPLIT", 8)  # so that contexts are split
    monkeypatch.setattr(fused, "PREFILL_ROWS", 16)
    front = tuple(range(1, 14))
    texts = [
        ((7,), tuple(range(3, 12))),
        (front, (5, 6)),
        (front, (5,)),
        ((*front, 9, 2, 4, 6), (1, 2)),
        ((1, 2), (3,)),
    ]
    requests = [ScoreRequest(context, continuation) for context, continuation in texts]
    config = LikelihoodConfig(method, mc_samples=8, block_length=length)
    expected, found = (
        dict(engine.score(requests, config))
        for engine in (make_engine("native", either, device="cpu"), engine_with_kernels(either))
    )
    assert sorted(found) == list(range(len(requests)))
    for index, result in found.items():
        assert result.log_likelihood == pytest.approx(expected[index].log_likelihood, rel=1e-4, abs=1e-4)
        assert dataclasses.replace(result, log_likelihood=0, standard_error=0) == dataclasses.replace(
            expected[index], log_likelihood=0, standard_error=0
        )


def test_experts_run_masked_copies_that_see_nothing_of_the_cache(tmp_path):
    """Experts leave padding out, which sees nothing. A text's first block sees itself only, and is no padding."""
    heads = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings = {"moe": True, "num_hidden_layers": 2, "mlp_only_layers": [1], **heads}  # the last layer runs elsewhere
    checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, **settings)))
    requests = [ScoreRequest((1,), (2, 3))]
    ((_, expected),) = make_engine("native", checkpoint, device="cpu").score(requests, LikelihoodConfig())
    ((_, found),) = engine_with_kernels(checkpoint).score(requests, LikelihoodConfig())
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-4)


def test_scoring_runs_on_the_device_of_the_weights(checkpoint, monkeypatch):
    """Triton launches on the current GPU, even if the tensors are on another one."""
    inside, seen = [], set()

    class Selected:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            inside.append(self.device)

        def __exit__(self, *error):
            inside.pop()

    monkeypatch.setattr(scoring_fused, "on_device", Selected)

    def noted(name, plain):
        def run(self, *args):
            seen.add((name, *inside))
            return plain(self, *args)

        return run

    for name in ("__call__", "finish", "logits"):
        monkeypatch.setattr(decoder.FusedDecoder, name, noted(name, getattr(decoder.FusedDecoder, name)))
    dict(engine_with_kernels(checkpoint).score([ScoreRequest((1, 2, 3), (4, 5))], LikelihoodConfig()))
    assert seen == {(name, torch.device("cpu")) for name in ("__call__", "finish", "logits")}
    assert not inside


class NamedDevice(str):
    """The CPU, in the place of a GPU."""

    type = "cuda"


@pytest.fixture
def measuring(checkpoint, tmp_path, monkeypatch):
    """A forward that measures, on a machine without times; times depend on the number of rows only."""

    def measure(self, run, rows):
        for name, numbers in rows.items():
            run(name, numbers[0])
        return {name: {number: float(number) for number in numbers} for name, numbers in rows.items()}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(timings.Timings, "_measured", measure)
    forward = engine_with_kernels(checkpoint).runner.forward
    forward._device = NamedDevice("cpu")
    return forward


def test_a_measurement_leaves_the_random_numbers_of_torch_alone(measuring):
    """Otherwise a user's random numbers would depend on whether a file has the times."""
    before = torch.get_rng_state()
    measuring.choose_kernels()
    assert measuring.sizes(4, 4)[-1] == 4
    assert measuring.draw_sizes(16, 8)[-1] == 16
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number", range(4))
def test_every_kernel_of_a_product_gives_the_same_tokens(either, monkeypatch, number):
    """Up to four kernels compute a product. Measured times choose one of them, here the one of this number."""
    requests = [GenerationRequest((1, 2, 3 + i), 4, DecodingConfig(), seed=i) for i in range(2)]
    engine, plain = (make_engine("native", either, device="cpu", kernels=kernels) for kernels in (True, False))
    used = set()
    for name, choice in engine.runner.forward.decoder.choices.items():
        wanted = [*choice.kernels][number % len(choice.kernels)]
        measured = choice.measured
        if measured:
            choice.choose({
                kernel: dict.fromkeys(rows, 1.0 if kernel == wanted else 2.0) for kernel, rows in measured.items()
            })  # fmt: skip
        kernel = choice.kernels[wanted]
        assert choice(8) is kernel.run
        monkeypatch.setattr(choice, "_chosen", tuple(noting(each, name, used) for each in choice._chosen))
    assert [r.token_ids for r in run(engine, requests)] == [r.token_ids for r in run(plain, requests)]
    assert used == set(engine.runner.forward.decoder.choices)


def noting(kernel, name, used):
    def run(*args):
        used.add(name)
        return kernel.run(*args)

    return dataclasses.replace(kernel, run=run)


def test_kernels_are_chosen_by_measured_times(measuring, monkeypatch):
    """The last kernel of each product is twice as fast. Each trial runs its own kernel, and restores the choice."""
    ran, last = set(), {name: [*choice.kernels][-1] for name, choice in measuring.decoder.choices.items()}
    fast = {f" {name} by {kernel}" for name, kernel in last.items()}

    def measure(self, run, rows):
        for trial, numbers in rows.items():
            name = next(name for name in measuring.decoder.choices if f" {name} by " in trial)
            chosen = measuring.decoder.choices[name]
            run(trial, numbers[0])
            assert measuring.decoder.choices[name] is chosen
        return {
            trial: dict.fromkeys(numbers, 1.0 if any(map(trial.endswith, fast)) else 2.0)
            for trial, numbers in rows.items()
        }

    def noted(self, name, x, *operands):
        ran.add((name, self.choices[name].kernel(len(x)).name))
        return product(self, name, x, *operands)

    product = decoder.FusedDecoder._product
    monkeypatch.setattr(decoder.FusedDecoder, "_product", noted)
    monkeypatch.setattr(timings.Timings, "_measured", measure)
    measuring.choose_kernels()
    measured = {name: choice for name, choice in measuring.decoder.choices.items() if choice.measured}
    assert measured.keys() == {"qkv", "o", "gate_up", "down"}
    assert ran >= {(name, kernel) for name, choice in measured.items() for kernel in choice.kernels}
    for name, choice in measured.items():
        assert [each.name for each in choice.used] == [last[name], "cuBLAS"]  # which alone takes many rows


def test_without_memory_for_a_measurement_the_kernels_stay(measuring, monkeypatch):
    def no_memory(self, run, rows):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timings.Timings, "_measured", no_memory)
    before = {name: choice.used for name, choice in measuring.decoder.choices.items()}
    measuring.choose_kernels()
    assert {name: choice.used for name, choice in measuring.decoder.choices.items()} == before
    assert not any(choice.times for choice in measuring.decoder.choices.values())


def test_another_engine_chooses_by_the_same_times(measuring, checkpoint, monkeypatch):
    measuring.choose_kernels()
    again = engine_with_kernels(checkpoint).runner.forward
    again._device = NamedDevice("cpu")
    monkeypatch.setattr(timings.Timings, "_measured", lambda *_: pytest.fail("measured again"))
    again.choose_kernels()
    for name, choice in measuring.decoder.choices.items():
        other = again.decoder.choices[name]
        assert [each.name for each in other.used] == [each.name for each in choice.used]
        assert other.times == choice.times


def test_experts_of_a_token_change_the_times(experts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    files = set()
    for top_k in (1, 2, 2):
        forward = engine_with_kernels(experts).runner.forward
        *others, last = forward.weights.layers
        mlp = dataclasses.replace(last.mlp, top_k=top_k)
        layers = [*others, dataclasses.replace(last, mlp=mlp)]
        forward.weights = dataclasses.replace(forward.weights, layers=layers)
        files.add(forward._timings._file)
    assert len(files) == 2


def test_a_text_with_nan_costs_the_others_nothing(tmp_path, monkeypatch):
    engine = engine_with_kernels(Checkpoint.open(str(random_checkpoint(tmp_path, head_dim=64, num_hidden_layers=2))))
    requests = [
        ScoreRequest((1, 2, 3, 4, 5), (6,)),
        ScoreRequest((1, 2, 3, 4, 5), (7, 8)),
        ScoreRequest((9,) * 6, (1,)),
    ]
    expected = dict(engine.score(requests, LikelihoodConfig()))
    engine.runner.forward.weights.embedding[9] = torch.nan
    found = {}
    with pytest.raises(EngineError, match=r"^1 of 3 requests .*Number 2: the model's logits are not finite"):
        found.update(engine.score(requests, LikelihoodConfig()))
    assert found == {0: expected[0], 1: expected[1]}


def test_modules_score_blocks_that_are_too_long_for_the_kernels(checkpoint, monkeypatch):
    engine = engine_with_kernels(checkpoint)
    engine.runner.forward.longest_block = 4
    for length, fused_rows in ((4, True), (5, False)):
        assert rows_forward(engine.model, engine.runner.forward, length).fused is fused_rows
    assert not rows_forward(engine.model, ModulesForward(engine.model, engine.runner.cache), 4).fused


def test_generation_after_scoring_gives_the_same_tokens(checkpoint):
    """The scored text is longer, so scoring makes the rotary cosines and sines of more positions."""
    engine = engine_with_kernels(checkpoint)
    wanted = [GenerationRequest((1, 2, 3), 4, DecodingConfig(temperature=0))]
    before = [result.token_ids for result in run(engine, wanted)]
    dict(engine.score([ScoreRequest((5,) * 30, (6,))], LikelihoodConfig()))
    assert [result.token_ids for result in run(engine, wanted)] == before


def test_prompts_of_several_tiles(tmp_path, monkeypatch):
    """The model has two layers: a prompt's attention affects only the keys and values of the second layer."""
    checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, head_dim=64, num_hidden_layers=2)))
    monkeypatch.setattr(fused, "PREFILL_ROWS", 16)
    decoding = DecodingConfig(temperature=0, remasking_strategy="low_confidence_static")
    requests = [
        GenerationRequest(tuple(range(i, i + length)), 3, decoding, record_steps=True)
        for i, length in ((1, 21), (30, 12))
    ]
    plain = run(make_engine("native", checkpoint, device="cpu"), requests)
    for ours, expected in zip(run(engine_with_kernels(checkpoint), requests), plain, strict=True):
        assert ours.token_ids == expected.token_ids
        assert ours.confidences == pytest.approx(expected.confidences, rel=1e-5)


def test_prompts_that_share_their_beginning(checkpoint, monkeypatch):
    monkeypatch.setattr(native_engine, "PAGE_SIZE", 4)
    decoding = DecodingConfig(temperature=0, remasking_strategy="low_confidence_static")
    requests = [GenerationRequest((*range(1, 10), *[100 + i] * i), 4, decoding) for i in range(4)]
    engine = engine_with_kernels(checkpoint)
    fast = run(engine, requests)
    assert engine.info.extra["shared_prompt_tokens"] == 3 * 8
    plain = run(make_engine("native", checkpoint, device="cpu", share_prefixes=False), requests)
    assert [r.token_ids for r in fast] == [r.token_ids for r in plain]


def test_filters_and_penalties_fall_back_to_pytorch(checkpoint, caplog):
    caplog.set_level("INFO")
    requests = [
        GenerationRequest((1, 2, 3, 4, 5), 4, DecodingConfig(top_k=5), seed=1),
        GenerationRequest((1, 2, 3), 4, DecodingConfig(repetition_penalty=1.3), seed=2),
    ]
    plain = run(make_engine("native", checkpoint, device="cpu"), requests)
    assert "PyTorch draws" not in caplog.text
    assert [r.token_ids for r in run(engine_with_kernels(checkpoint), requests)] == [r.token_ids for r in plain]
    assert "PyTorch draws" in caplog.text


@pytest.mark.parametrize(("kernels", "interpret", "reason"), [("yes", "1", "neither true nor"), (True, "0", "a GPU")])
def test_where_they_cannot_run(checkpoint, monkeypatch, kernels, interpret, reason):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(UserError, match=reason):
        make_engine("native", checkpoint, device="cpu", kernels=kernels)


def row_by_row(x, weight):
    return torch.cat([torch.nn.functional.linear(row, weight) for row in x.split(1)])


def gated_row_by_row(x, weight):
    gate, up = row_by_row(x, weight).chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize(
    ("either", "products"),
    [
        pytest.param("dense", "of fixed size", marks=pytest.mark.slow),
        ("dense", "row by row"),
        pytest.param("experts", "row by row", marks=pytest.mark.slow),
    ],
    indirect=["either"],
)
def test_reproducible_to_the_bit(either, monkeypatch, products):
    """Confidences are equal to the bit in any batch and order, after a preemption, and with a shared prefix.

    Products row by row are batch-invariant, as they are on Hopper GPUs.
    """
    monkeypatch.setattr(graphs, "REPRODUCIBLE_ROWS", REPRODUCIBLE_ROWS)
    if products == "row by row":
        hopper = types.SimpleNamespace(run_for=lambda *weights: True, product=row_by_row, gated=gated_row_by_row)
        monkeypatch.setattr(choices, "hopper", hopper)
    monkeypatch.setattr(native_engine, "PAGE_SIZE", 4)
    settings = [(6, DecodingConfig()), (6, DecodingConfig()), (1, DecodingConfig(top_k=5))]
    requests = [
        GenerationRequest((*range(6), i), tokens, decoding, seed=i, record_steps=True)
        for i, (tokens, decoding) in enumerate(settings)
    ]
    rows, drawn_from, tiles_seen = set(), set(), set()
    attend, filtered = attention.attend, unmasking.filtered_probabilities

    def by_pytorch(logits, *args, **kwargs):
        drawn_from.add(tuple(logits.shape))
        return filtered(logits, *args, **kwargs)

    monkeypatch.setattr(unmasking, "filtered_probabilities", by_pytorch)

    def shape_of(query, keys, values, tiles, scaling):
        rows.add(len(query))
        tiles_seen.add((tiles.tokens, tiles.batch_invariant))
        return attend(query, keys, values, tiles, scaling)

    monkeypatch.setattr(attention, "attend", shape_of)

    def answers(wanted, **options):
        engine = engine_with_kernels(either, reproducible=True, **options)
        results = run(engine, wanted)
        return {request.seed: (r.token_ids, r.confidences) for request, r in zip(wanted, results, strict=True)}, engine

    together, _ = answers(requests, share_prefixes=False)
    tight, engine = answers(requests[::-1], kv_pages=6)
    assert engine.info.extra["preemptions"] > 0
    single, _ = answers(requests[1:2])
    assert tight == together
    assert single == {1: together[1]}
    assert tiles_seen == {(4, True)}  # kernel settings and rounding depend on it
    # For the request with top_k: 711 tokens and one of padding, so that rows begin at multiples of 16 bytes.
    assert drawn_from == {(REPRODUCIBLE_ROWS, 712)}
    assert (rows == {REPRODUCIBLE_ROWS}) == (products == "of fixed size")


@pytest.mark.slow
def test_a_run_after_prepare_captures_no_graph(checkpoint, monkeypatch):
    captured = []

    class Graph:
        def __init__(self, run):
            self.replay = run

    def capture(self, key):
        captured.append(key)
        return Graph(lambda: self.run(*key))

    monkeypatch.setattr(graphs.Graphs, "capture", capture)
    init = graphs.Graphs.__init__
    monkeypatch.setattr(
        graphs.Graphs, "__init__", lambda self, run, sizes, enabled: init(self, run, sizes, enabled=True)
    )
    monkeypatch.setattr(attention, "SPLIT", 12)
    requests = [GenerationRequest(tuple(range(n)), 5, DecodingConfig(), seed=n) for n in (3, 11)]
    expected = run(make_engine("native", checkpoint, device="cpu"), requests)
    engine = engine_with_kernels(checkpoint, max_active=2, kv_pages=20)
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(engine, "device", torch.device("cuda"))
        engine.prepare(requests)
    contexts = {key[1] for key in captured if len(key) == 2}
    assert len(contexts) > 1
    before = len(captured)
    assert [r.token_ids for r in run(engine, requests)] == [r.token_ids for r in expected]
    assert len(captured) == before


def test_graphs_that_prepare_has_no_time_for():
    made = []
    captures = graphs.Graphs(made.append, [2, 4], enabled=True)
    captures.prepare(4, until=0.0)
    assert made == []


def test_reproducible_takes_the_kernels(checkpoint):
    with pytest.raises(UserError, match=r"reproducible=true needs the kernels.*kernels=false"):
        make_engine("native", checkpoint, device="cpu", reproducible=True)


def test_blocks_that_are_too_long_for_the_kernels(checkpoint):
    request = GenerationRequest((1, 2, 3), 4, DecodingConfig(block_length=256))
    with pytest.raises(UserError, match=r"block_length=256: the kernels take blocks of up to 128 .*kernels=false"):
        engine_with_kernels(checkpoint).prepare([request])


def test_weights_are_not_there_twice(checkpoint):
    engine = engine_with_kernels(checkpoint)
    attention = engine.model.model.layers[0].self_attn
    joined = engine.runner.forward.weights.layers[0].qkv
    assert attention.k_proj.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    assert torch.equal(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]), joined)


def test_experts_whose_sizes_the_kernels_do_not_take(tmp_path):
    checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path, moe=True, head_dim=64, moe_intermediate_size=20)))
    engine = make_engine("native", checkpoint, device="cpu", kernels=True)
    assert not engine.runner.forward.captures
    requests = [GenerationRequest((1, 2, 3, 4, 5), 5, DecodingConfig(temperature=0))]
    plain = run(make_engine("native", checkpoint, device="cpu"), requests)
    assert run(engine, requests)[0].token_ids == plain[0].token_ids


@pytest.mark.parametrize("one_module_each", [False, True], ids=["one tensor of all", "a module for each"])
def test_experts_weights_are_not_there_twice(experts, one_module_each):
    """transformers 5 holds a layer's experts as one tensor, transformers 4 as a module for each."""
    model = experts.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
    block = model.model.layers[1].mlp
    gate_up, down = _tensors_of(block)
    if one_module_each and hasattr(block.experts, "gate_up_proj"):
        block.experts = torch.nn.ModuleList(_modules_of(gate_up, down))
    weights = experts.family.fused(model).layers[1].mlp
    assert torch.equal(weights.gate_up, gate_up)
    assert torch.equal(weights.down, down)
    own = list(block.experts.parameters())
    storages = {parameter.untyped_storage().data_ptr() for parameter in own}
    assert storages == {weights.gate_up.untyped_storage().data_ptr(), weights.down.untyped_storage().data_ptr()}


def _tensors_of(block):
    if hasattr(block.experts, "gate_up_proj"):
        return block.experts.gate_up_proj.clone(), block.experts.down_proj.clone()
    gate_up = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in block.experts]
    return torch.stack(gate_up), torch.stack([expert.down_proj.weight for expert in block.experts])


def _modules_of(gate_up, down):
    for own_gate_up, own_down in zip(gate_up, down, strict=True):
        expert = torch.nn.Module()
        for name, weight in zip(("gate", "up", "down"), (*own_gate_up.chunk(2), own_down), strict=True):
            projection = torch.nn.Linear(*weight.shape[::-1], bias=False)
            projection.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            setattr(expert, f"{name}_proj", projection)
        yield expert
