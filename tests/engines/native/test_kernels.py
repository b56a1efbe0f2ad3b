"""The Triton kernels compared with PyTorch: on the CPU through Triton's interpreter, on a GPU compiled.

Outputs that a kernel is given are filled with NaN first. Outputs that a kernel allocates start as `torch.empty`.
"""

from __future__ import annotations

import pytest
import torch
import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
layers = pytest.importorskip("sdar_lm_eval.engines.native.kernels.layers", exc_type=ImportError)
kernels = pytest.importorskip("sdar_lm_eval.engines.native.kernels.attention", exc_type=ImportError)
drawing = pytest.importorskip("sdar_lm_eval.engines.native.kernels.drawing", exc_type=ImportError)

from sdar_lm_eval.engines.native import unmasking  # noqa: E402

DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape, dtype):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(got, expected, dtype):
    torch.testing.assert_close(got.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("size", [64, 100])
def test_add_norm(dtype, size):
    x, residual, weight = normal(5, size, dtype=dtype), normal(5, size, dtype=dtype), normal(size, dtype=dtype)

    def norm(t):
        t = t.float()
        return t * torch.rsqrt((t * t).mean(-1, keepdim=True) + 1e-6) * weight.float()

    out, added = layers.add_norm(x, None, weight, 1e-6)
    assert torch.equal(added, x)
    close(out, norm(x), dtype)
    expected = x + residual
    out, added = layers.add_norm(x, residual.clone(), weight, 1e-6)
    close(added, expected, dtype)
    close(out, norm(expected), dtype)


@pytest.mark.parametrize(("rows", "size", "inputs", "splits"), [(1, 40, 48, 1), (16, 64, 256, 4), (5, 100, 64, 2)])
def test_few_rows(dtype, rows, size, inputs, splits):
    x, weight, residual = (
        normal(rows, inputs, dtype=dtype),
        normal(size, inputs, dtype=dtype),
        normal(rows, size, dtype=dtype),
    )
    out = layers.few_rows(x, weight, splits=splits)
    expected = x.float() @ weight.float().T
    close(out.float().sum(0) if splits > 1 else out, expected, dtype)
    ones = torch.ones(size, dtype=dtype, device=DEVICE)
    normed, added = layers.add_norm(out, residual.clone(), ones, 1e-6)
    close(added, expected + residual.float(), dtype)
    close(normed, torch.nn.functional.rms_norm(expected + residual.float(), (size,), eps=1e-6), dtype)


def test_few_rows_gated(dtype):
    x, weight = normal(3, 96, dtype=dtype), normal(2 * 50, 96, dtype=dtype)
    gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
    close(layers.few_rows(x, weight, gated=True), torch.nn.functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("size", [48, 1500])
def test_silu_mul(dtype, size):
    x = normal(3, 2 * size, dtype=dtype)
    gate, up = x.float().chunk(2, dim=-1)
    close(layers.silu_mul(x), torch.nn.functional.silu(gate) * up, dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (4, 1, 128)])
def test_norm_rope_store(dtype, heads, kv_heads, size):
    tokens, pages, page = 7, 4, 16
    qkv = normal(tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    q_weight, k_weight = normal(size, dtype=dtype), normal(size, dtype=dtype)
    angles = torch.outer(torch.arange(100).float(), 1e4 ** (-torch.arange(0, size, 2) / size))
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(DEVICE)
    positions = torch.randint(0, 100, (tokens,), device=DEVICE)
    places = torch.randperm(pages * page, device=DEVICE)[:tokens]
    keys, values = (torch.full((pages, page, kv_heads, size), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    query = layers.norm_rope_store(qkv, q_weight, k_weight, cos_sin, positions, places, keys, values, 1e-6)

    def norm_rope(t, weight):  # (T, heads, size)
        t = t.float()
        t = t * torch.rsqrt((t * t).mean(-1, keepdim=True) + 1e-6) * weight.float()
        a, b = t.chunk(2, dim=-1)
        cos, sin = cos_sin[positions].chunk(2, dim=-1)
        return torch.cat([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], dim=-1)

    q, k, v = qkv.view(tokens, -1, size).split([heads, kv_heads, kv_heads], dim=1)
    close(query, norm_rope(q, q_weight), dtype)
    close(keys.flatten(0, 1)[places], norm_rope(k, k_weight), dtype)
    assert torch.equal(values.flatten(0, 1)[places], v)
    untouched = torch.ones(pages * page, dtype=torch.bool, device=DEVICE)
    untouched[places] = False
    assert keys.flatten(0, 1)[untouched].isnan().all()


def attention(query, keys, values, tiles, scaling):
    """The reference: attention of one token after the other."""
    out = torch.full(query.shape, torch.nan, device=query.device)
    group = query.shape[1] // keys.shape[2]
    for tile in range(len(tiles.first)):
        for token in range(int(tiles.first[tile]), int(tiles.first[tile] + tiles.count[tile])):
            n = int(tiles.visible[token])
            k, v = (cache[tiles.pages[tiles.sequence[tile]]].flatten(0, 1)[:n].float() for cache in (keys, values))
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
            scores = torch.einsum("hd,nhd->hn", query[token].float(), k) * scaling
            out[token] = torch.einsum("hn,nhd->hd", scores.softmax(-1), v)
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (8, 2, 128), (2, 2, 64)])
@pytest.mark.parametrize("block", [1, 4, 16, 64])
@pytest.mark.parametrize("context", [3, 90, 300 if DEVICE == "cpu" else 700])
def test_attend(dtype, heads, kv_heads, size, block, context, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "SPLIT", 64)
        if (context > 100) + 2 * (block > 16) + (heads != 4) > 1:
            pytest.skip("the interpreter is slow")
    page = 16
    counts = [block, 0, block]  # the middle tile is padding
    lengths = torch.tensor([context, 0, max(context // 2, 1)])
    per_sequence = -(-(context + block) // page)
    keys, values = (normal(3 * per_sequence + 1, page, kv_heads, size, dtype=dtype) for _ in range(2))
    order = torch.randperm(3 * per_sequence, device=DEVICE) + 1
    tiles = kernels.Tiles(
        first=torch.tensor([0, block, 2 * block], device=DEVICE),
        count=torch.tensor(counts, device=DEVICE),
        pages=order.view(3, per_sequence),
        sequence=torch.tensor([2, 0, 1], device=DEVICE),
        visible=(lengths + block).repeat_interleave(block).to(DEVICE),
        tokens=block,
        split=kernels.SPLIT,
        splits=-(-(context + block) // kernels.SPLIT),
    )
    query = normal(3 * block, heads, size, dtype=dtype)
    got = kernels.attend(query, keys, values, tiles, size**-0.5)
    expected = attention(query, keys, values, tiles, size**-0.5)
    real = ~expected.isnan()
    assert real.sum() == 2 * block * heads * size
    close(got[real], expected[real], dtype)


@pytest.mark.parametrize("context", [1, 512, 513, 5000, 32_768])
@pytest.mark.parametrize("programs", [1, 8, 256, 1024, 10_000])
def test_splits_fill_the_gpu_and_are_no_more(dtype, context, programs):
    padded, filling = kernels.padded_context(context), kernels.FILLING * kernels.multiprocessors()
    assert context <= padded < 2 * max(context, kernels.SPLIT)
    for longest in (kernels.LONGEST_SPLIT, kernels.WHOLE):
        split, splits = kernels.splits_of(padded, programs, longest)
        assert split * splits == padded
        assert split <= max(longest, kernels.SPLIT)
        if split > kernels.SPLIT:
            assert programs * splits >= filling
        if 2 * split <= min(padded, longest):
            assert programs * splits // 2 < filling


def test_batch_invariant_attention_is_set_alike_for_any_number_of_tiles_and_any_context(dtype, monkeypatch):
    """The column block affects the rounding in 16 bits."""
    seen, settings = set(), kernels.attention_settings

    def keep(rows, programs, itemsize):
        seen.add(next(settings(rows, programs, 2)))
        return settings(rows, programs, itemsize)

    monkeypatch.setattr(kernels, "attention_settings", keep)
    monkeypatch.setattr(kernels, "multiprocessors", lambda: 8)
    keys, values = (normal(3, 16, 2, 64, dtype=dtype) for _ in range(2))

    def attend(tiles, splits, *, batch_invariant):
        number = torch.zeros(tiles, dtype=torch.int64, device=DEVICE)
        pages = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)
        some = kernels.Tiles(number, number, pages, number, number, 4, 512, splits, batch_invariant=batch_invariant)
        kernels.attend(normal(tiles, 4, 64, dtype=dtype), keys, values, some, 1.0)

    many = 5 * kernels.multiprocessors()
    for tiles, splits in ((1, 1), (many, 1), (many, 2)):
        attend(tiles, splits, batch_invariant=True)
    assert len(seen) == 1
    for tiles in (1, kernels.multiprocessors(), many):
        attend(tiles, 1, batch_invariant=False)
    assert len(seen) == 3


def test_attention_takes_settings_that_fit_the_shared_memory(dtype, monkeypatch):
    """An H200 has room for all settings. Here the GPU has room for column blocks of 16 only."""
    tried, kernel = [], kernels.attend_kernel

    class Small:
        def __getitem__(self, grid):
            def launch(*args, **options):
                tried.append((args[-3], options["num_stages"]))
                if args[-3] > most:
                    raise triton.OutOfResources(300 << 10, 99 << 10, "shared memory")
                kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(kernels, "attend_kernel", Small())
    query, (keys, values) = normal(4, 4, 64, dtype=dtype), (normal(3, 16, 2, 64, dtype=dtype) for _ in range(2))
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    tiles = kernels.Tiles(one - 1, 4 * one, one[None], one - 1, one.repeat(4) * 9, 4, 512, 1)
    most = 16
    close(kernels.attend(query, keys, values, tiles, 1.0), attention(query, keys, values, tiles, 1.0), dtype)
    columns = 32 if dtype == torch.float32 else 128
    assert tried[:2] == [(columns, 3), (columns, 2)] and tried[-1] == (16, 2)
    most = 8
    with pytest.raises(triton.OutOfResources):
        kernels.attend(query, keys, values, tiles, 1.0)


def test_attend_over_blocks_of_a_prompt(dtype):
    """A tile holds several blocks; each sees itself and the blocks before."""
    heads, kv_heads, size, page, block = 4, 2, 64, 16, 4
    keys, values = (normal(9, page, kv_heads, size, dtype=dtype) for _ in range(2))
    tiles = kernels.Tiles(
        first=torch.tensor([0, 16], device=DEVICE),
        count=torch.tensor([16, 12], device=DEVICE),
        pages=torch.tensor([[4, 2, 6], [3, 1, 5]], device=DEVICE),
        sequence=torch.tensor([1, 1], device=DEVICE),
        visible=((torch.arange(28, device=DEVICE) // block) + 1) * block,
        tokens=16,
        split=512,
        splits=1,
    )
    query = normal(28, heads, size, dtype=dtype)
    close(kernels.attend(query, keys, values, tiles, 0.125), attention(query, keys, values, tiles, 0.125), dtype)


@pytest.mark.parametrize(
    ("splits", "length", "split"), [(1, 4, 16), (3, 4, 16), (1, 32, 16), (2, 3, 16), (1, 32, 64), (2, 32, 64)]
)
def test_attend_branches(dtype, splits, length, split):
    """Branches side by side in a tile see different parts of one context: all, some or none of its tokens."""
    heads, kv_heads, size = 4, 2, 64
    sees = torch.tensor([split * splits, 0, 7, 1, 0], device=DEVICE)  # of each branch
    branches, tokens = len(sees), len(sees) * length
    keys, values = (normal(split * splits + 1, 1, kv_heads, size, dtype=dtype) for _ in range(2))
    own_keys, own_values = (normal(tokens, 1, kv_heads, size, dtype=dtype) for _ in range(2))
    whole = torch.tensor([0, 2 * length, 3 * length], device=DEVICE)  # the tiles: two branches, one, and two
    number = torch.arange(branches, device=DEVICE)
    pages = torch.randperm(split * splits, device=DEVICE)[None] + 1
    tiles = kernels.Tiles(
        whole, torch.tensor([2, 1, 2], device=DEVICE) * length, pages, torch.zeros_like(whole),
        sees.repeat_interleave(length), 2 * length, split, splits,
    )  # fmt: skip
    own = kernels.Tiles(
        number * length, torch.full_like(number, length), torch.arange(tokens, device=DEVICE).view(branches, length),
        number, torch.full((tokens,), length, device=DEVICE), length, 512, 1,
    )  # fmt: skip
    query = normal(tokens, heads, size, dtype=dtype)
    got = kernels.attend_branches(query, keys, values, tiles, kernels.Branches(own_keys, own_values, own), size**-0.5)
    for branch, n in enumerate(sees.tolist()):
        rows = slice(branch * length, (branch + 1) * length)
        seen = [torch.cat([kv[pages[0, :n]], new[rows]])[:, 0] for kv, new in ((keys, own_keys), (values, own_values))]
        k, v = (kv.float().repeat_interleave(heads // kv_heads, dim=1) for kv in seen)
        weights = (torch.einsum("lhd,nhd->lhn", query[rows].float(), k) * size**-0.5).softmax(-1)
        close(got[rows], torch.einsum("lhn,nhd->lhd", weights, v), dtype)


@pytest.mark.parametrize("vocabulary", [5, 711, 9000])
def test_draw(dtype, vocabulary):
    rows = 6
    logits = normal(rows, vocabulary, dtype=dtype) * 4
    logits[1, -1] = logits[1, 3] = logits[1, 2] = logits[1].max() + 1  # a tie: the lowest id
    mask_token = 1
    logits[2, mask_token] = 50
    greedy = torch.tensor([True, True, True, False, False, False], device=DEVICE)
    temperature = torch.tensor([1, 1, 1, 1, 0.5, 2], device=DEVICE)
    number = torch.tensor([0, 0, 0, 0.999999, 0.3, 0.0], device=DEVICE)
    token, confidence, entropy = drawing.draw(logits, temperature, number, greedy, mask_token)

    reference = logits.float()
    reference[:, mask_token] = -torch.inf
    best, sure = unmasking.draw_greedy(reference)
    probabilities = (reference / temperature[:, None]).softmax(-1)
    drawn, likely = unmasking.draw_sampled(probabilities, number)
    assert torch.equal(token, torch.where(greedy, best, drawn))
    torch.testing.assert_close(confidence, torch.where(greedy, sure, likely), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy, unmasking.entropy(probabilities), rtol=1e-3, atol=1e-4)

    without = drawing.draw(logits, temperature, number, greedy, mask_token, entropies=False)
    assert torch.equal(without[0], token) and torch.equal(without[1], confidence) and not without[2].any()


def test_draws_follow_the_distribution(dtype):
    logits = normal(1, 11, dtype=dtype).expand(150, 11).contiguous()
    number = (torch.arange(150, device=DEVICE) + 0.5) / 150
    ones = torch.ones(150, device=DEVICE)
    flags = torch.zeros(150, dtype=torch.bool, device=DEVICE)
    token, _, _ = drawing.draw(logits, ones, number, flags, 4)
    reference = logits[0].float()
    reference[4] = -torch.inf
    shares = torch.bincount(token, minlength=11) / 150
    torch.testing.assert_close(shares, reference.softmax(-1), rtol=0, atol=1 / 150)


def test_logits_that_are_no_numbers_show(dtype):
    logits = normal(2, 50, dtype=dtype)
    logits[0, 7] = torch.nan
    ones = torch.ones(2, device=DEVICE)
    for greedy in (True, False):
        flags = torch.full((2,), greedy, device=DEVICE)
        token, confidence, _ = drawing.draw(logits, ones, ones * 0.5, flags, 1)
        assert confidence.isnan().tolist() == [True, False]
        assert ((token >= 0) & (token < 50)).all()
