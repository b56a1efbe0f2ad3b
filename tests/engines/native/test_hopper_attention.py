"""The attention kernel for Hopper GPUs: any machine tests its choice, and a Hopper GPU tests its results."""

from __future__ import annotations

import logging
import types

import pytest
import torch

hopper_attention = pytest.importorskip("sdar_lm_eval.engines.native.kernels.hopper_attention", exc_type=ImportError)

from sdar_lm_eval.engines.native.forward import decoder  # noqa: E402  (needs triton)
from sdar_lm_eval.engines.native.kernels.attention import SPLIT, WHOLE, Tiles  # noqa: E402
from sdar_lm_eval.families.base import DenseMLP  # noqa: E402

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="takes a Hopper GPU")
SHAPES = [(32, 8, 128), (32, 4, 128), (5, 1, 128), (16, 16, 64)]  # query heads, KV heads, head size


def page(page_size=16, kv_heads=2, size=128, dtype=torch.bfloat16):
    return torch.zeros(1, page_size, kv_heads, size, dtype=dtype)


def test_the_kernel_does_not_run_on_other_devices():
    assert not hopper_attention.runs(4, page())


@pytest.fixture
def tried(monkeypatch):
    """The tokens of each tile that the kernel was tried with, on a Hopper GPU where the kernel does not run."""
    tried = []

    def attend(query, keys, values, tiles, scaling):
        tried.append(tiles.tokens)
        raise AttributeError("'tma' has no 'load'")

    monkeypatch.setattr(hopper_attention, "attend", attend)
    monkeypatch.setattr(hopper_attention, "is_hopper", lambda device: True)
    return tried


@pytest.mark.parametrize(
    ("heads", "cache"),
    [
        (4, page(dtype=torch.float32)),
        (4, page(size=96)),
        (4, page(page_size=4)),
        (4, page(page_size=128)),
        (130, page()),
    ],
)
def test_the_kernel_is_not_tried_with_other_shapes(tried, heads, cache):
    assert not hopper_attention.runs(heads, cache)
    assert not tried


def test_a_kernel_that_does_not_run_is_logged(tried, caplog):
    with caplog.at_level(logging.WARNING):
        assert not hopper_attention.runs(4, page())
    assert "Triton's kernel takes its place" in caplog.text
    assert "'tma' has no 'load'" in caplog.text
    assert tried == [1]


def some_tiles(tokens, context, *, tiles=1, batch_invariant=False):
    one = torch.ones(1, dtype=torch.int64)
    number = torch.zeros(tiles, dtype=torch.int64)
    return Tiles(number, number + 1, one[None], number, one, tokens, context, 1, batch_invariant)


@pytest.mark.parametrize(
    ("tokens", "context", "tiles", "taken"),
    [
        (8, 512, 1, False),
        (8, 1024, 1, True),
        (16, 512, 1, True),
        # many programs
        (16, 512, 64, False),
        (32, 512, 64, False),
        (32, 1024, 64, True),
        (8, 1024, 64, True),
        (64, 512, 64, True),
    ],
)
def test_the_kernel_takes_what_it_is_the_fastest_for(tokens, context, tiles, taken):
    """32 query heads share 8 KV heads. An H200 has 132 multiprocessors, and 64 tiles have 512 programs."""
    assert hopper_attention.suits(some_tiles(tokens, context, tiles=tiles), 32, 8) == taken


def test_the_kernel_takes_all_tiles_if_results_have_to_be_batch_invariant():
    """The longest context of a batch must not decide, because the kernels round differently. Nor must the batch."""
    assert all(
        hopper_attention.suits(some_tiles(tokens, context, tiles=tiles, batch_invariant=True), 32, 8)
        for tokens in (1, 4, 64)
        for context in (512, 1024, 8192)
        for tiles in (1, 64)
    )


@pytest.mark.parametrize(
    ("runs", "context", "page", "taken"),
    [(True, 1024, 16, True), (True, 512, 16, False), (False, 1024, 16, False), (True, 1024, 1, False)],
)
def test_the_decoder_takes_the_kernel_where_the_kernel_runs_and_suits(monkeypatch, runs, context, page, taken):
    """The decoder calls `runs` when tiles first suit: `runs` compiles the kernel, which short contexts never need.

    `runs` gets the heads of the weights, and a page of the cache. Scoring has pages of one token.
    """
    asked, attended = [], []

    def answer(heads, cache):
        asked.append((heads, tuple(cache.shape), cache.dtype))
        return runs

    monkeypatch.setattr(hopper_attention, "runs", answer)
    monkeypatch.setattr(decoder.layers, "add_norm", lambda x, *_: (x, x))
    monkeypatch.setattr(decoder.layers, "norm_rope_store", lambda qkv, *_: qkv[:, : 8 * 64].view(-1, 8, 64))
    for name, module in (("hopper", hopper_attention), ("triton", decoder.attention)):
        monkeypatch.setattr(module, "attend", lambda query, *_, name=name: attended.append(name) or query)
    layer = types.SimpleNamespace(
        qkv=torch.zeros((8 + 2 * 2) * 64, 32), o=torch.zeros(32, 8 * 64),
        mlp=DenseMLP(torch.zeros(64, 32), torch.zeros(32, 32)),
        input_norm=None, q_norm=None, k_norm=None, qkv_bias=None, o_bias=None,
    )  # fmt: skip
    weights = types.SimpleNamespace(
        norm=torch.zeros(32), head_dim=64, layers=[layer], head=None, embedding=torch.zeros(10, 32), eps=1e-6
    )
    made = decoder.FusedDecoder(weights, types.SimpleNamespace(page_size=16, kv_heads=2))
    tokens = torch.zeros(4, dtype=torch.int64)
    for _ in range(2):
        made(tokens, tokens, tokens, some_tiles(4, context), torch.zeros(1, 2, 3, page, 2, 64))
    assert attended == 2 * ["hopper" if taken else "triton"]
    assert asked == [(8, (1, 16, 2, 64), torch.float32)] * (context == 1024 and page == 16)


def tiles_of(begins, new, tile, block, *, splits, page_size=16):
    """Tiles of sequences that have `new` tokens behind `begins` tokens each, with pages in random order.

    The last two tiles are padding.
    """
    ends = [begin + new for begin in begins]
    per_sequence = -(-max(ends) // page_size)
    count = len(begins) * per_sequence
    table = torch.full((len(begins), per_sequence + 7), count + 99_999)  # the last 7 entries of a row are no pages
    table[:, :per_sequence] = torch.randperm(count).view(len(begins), -1) + 1
    own = -(-new // tile)
    number = torch.arange(own).repeat(len(begins))
    sequence = torch.arange(len(begins)).repeat_interleave(own)
    position = torch.cat([torch.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
    last = torch.tensor(ends).repeat_interleave(new)
    split = SPLIT if splits else WHOLE
    padding = torch.zeros(2, dtype=torch.int64)
    return Tiles(
        first=torch.cat([sequence * new + number * tile, padding]).cuda(),
        count=torch.cat([(new - number * tile).clamp(max=tile), padding]).cuda(),
        pages=table.cuda(),
        sequence=torch.cat([sequence, padding]).cuda(),
        visible=torch.minimum((position // block + 1) * block, last).cuda(),
        tokens=tile,
        split=split,
        splits=-(-max(ends) // split),
    )


def cache_of(tiles, ends, kv_heads, size, dtype, page_size=16):
    """Random keys and values of sequences that have `ends` tokens. All other slots hold infinity or NaN."""
    shape = (int(tiles.pages[:, :-7].max()) + 1, page_size, kv_heads, size)
    caches = [torch.full(shape, torch.nan, dtype=dtype, device="cuda") for _ in range(2)]
    for pages, end in zip(tiles.pages, ends, strict=True):
        for cache in caches:
            own = cache[pages[: -(-end // page_size)]].flatten(0, 1)
            own[:end] = torch.randn(end, kv_heads, size, device="cuda").to(dtype)
            own[end:] = torch.inf
            cache[pages[: -(-end // page_size)]] = own.view(-1, *shape[1:])
    return caches


def by_pytorch(query, keys, values, tiles, ends, scaling):
    group = query.shape[1] // keys.shape[2]
    outs = []
    for sequence, end in enumerate(ends):
        own = slice(sequence * len(query) // len(ends), (sequence + 1) * len(query) // len(ends))
        k, v = (
            cache[tiles.pages[sequence, :-7]].flatten(0, 1)[:end].float().repeat_interleave(group, 1).transpose(0, 1)
            for cache in (keys, values)
        )
        sees = torch.arange(end, device="cuda") < tiles.visible[own, None]
        q = query[own].float().transpose(0, 1)
        outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, sees, scale=scaling).transpose(0, 1))
    return torch.cat(outs)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
@pytest.mark.parametrize(
    ("begins", "new", "tile", "block"),
    [
        ([0], 4, 8, 4),
        ([1001, 30, 517], 8, 8, 4),  # a block and its predecessor
        ([999, 2], 4, 8, 4),
        ([0, 0], 300, 64, 4),  # prompts
        ([64, 640], 77, 32, 1),
        ([2000, 48], 131, 64, 4),
        ([1000, 0], 64, 64, 64),
    ],
)
@pytest.mark.parametrize("splits", [False, True])
def test_attend(dtype, heads, kv_heads, size, begins, new, tile, block, splits):
    torch.manual_seed(0)
    tiles = tiles_of(begins, new, tile, block, splits=splits)
    ends = [begin + new for begin in begins]
    keys, values = cache_of(tiles, ends, kv_heads, size, dtype)
    query = torch.randn(len(begins) * new, heads, size, device="cuda").to(dtype)
    expected = by_pytorch(query, keys, values, tiles, ends, size**-0.5)
    torch.full_like(query, torch.nan)  # freed at once, so that the memory of the result holds NaN
    got = hopper_attention.attend(query, keys, values, tiles, size**-0.5)
    torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-2)


@on_hopper
def test_other_page_sizes():
    for page_size in (8, 32, 64):
        tiles = tiles_of([500, 3], 40, 40, 4, splits=False, page_size=page_size)
        keys, values = cache_of(tiles, [540, 43], 2, 128, torch.bfloat16, page_size)
        query = torch.randn(80, 8, 128, device="cuda").bfloat16()
        expected = by_pytorch(query, keys, values, tiles, [540, 43], 0.1)
        got = hopper_attention.attend(query, keys, values, tiles, 0.1)
        torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-2)


@on_hopper
def test_the_result_of_a_tile_does_not_depend_on_other_tiles():
    tiles = tiles_of([900, 60, 2000] * 30, 8, 8, 4, splits=True)
    keys, values = cache_of(tiles, [908, 68, 2008] * 30, 4, 128, torch.bfloat16)
    query = torch.randn(90 * 8, 32, 128, device="cuda").bfloat16()
    whole = hopper_attention.attend(query, keys, values, tiles, 0.1)
    for tile in range(90):
        one = Tiles(
            tiles.first[:1], tiles.count[:1], tiles.pages[tile : tile + 1].contiguous(), tiles.sequence[:1],
            tiles.visible[tile * 8 : tile * 8 + 8].contiguous(), 8, tiles.split, tiles.splits,
        )  # fmt: skip
        alone = hopper_attention.attend(query[tile * 8 : tile * 8 + 8].contiguous(), keys, values, one, 0.1)
        assert torch.equal(alone, whole[tile * 8 : tile * 8 + 8])


@on_hopper
def test_a_cuda_graph_reads_new_inputs():
    tiles = tiles_of([700, 100], 8, 8, 4, splits=True)
    keys, values = cache_of(tiles, [708, 108], 8, 128, torch.bfloat16)
    query = torch.zeros(16, 32, 128, device="cuda", dtype=torch.bfloat16)
    hopper_attention.attend(query, keys, values, tiles, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hopper_attention.attend(query, keys, values, tiles, 0.1)
    for _ in range(3):
        query.normal_()
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, hopper_attention.attend(query, keys, values, tiles, 0.1))
