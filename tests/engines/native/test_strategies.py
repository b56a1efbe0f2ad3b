"""The registry of remasking strategies, and each rule by numbers that can be checked by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from asking import run
from support import random_checkpoint

from sdar_lm_eval import Checkpoint, DecodingConfig, GenerationRequest, UserError, make_engine
from sdar_lm_eval.decoding import DECODING_SETTINGS
from sdar_lm_eval.engines.adapters.jetengine import versions
from sdar_lm_eval.engines.native import strategies, unmasking
from sdar_lm_eval.engines.native.runner import Runner
from sdar_lm_eval.engines.native.strategies import STRATEGIES, codes, full_name
from sdar_lm_eval.engines.native.strategies.base import Candidates
from sdar_lm_eval.engines.registry import ENGINES
from sdar_lm_eval.settings import read_generation

ALL = [True] * 4
CONFIDENCE = [0.5, 0.95, 0.2, 0.9]
ENTROPY = [0.4, 0.1, 1.0, 0.2]  # the sums of the lowest: 0.1, 0.3, 0.7, 1.7
ROOT = Path(__file__).parents[3]


def kept(name, masked=ALL, quota=1, setting=0.0):
    """The positions of one block whose token a strategy keeps."""
    candidates = Candidates(
        torch.tensor([masked]), torch.tensor([CONFIDENCE]), torch.tensor([ENTROPY]), torch.arange(4),
        torch.tensor([quota]), torch.tensor([setting]), lambda: torch.tensor([[0.7, 0.6, 0.1, 0.3]]),
    )  # fmt: skip
    strategy = STRATEGIES[name]
    selected = unmasking.select_first(strategy.order(candidates), strategy.count(candidates), candidates.masked)
    return selected.nonzero()[:, 1].tolist()


def test_static_keeps_the_most_confident():
    assert kept("low_confidence_static", quota=2) == [1, 3]


def test_sequential_keeps_the_leftmost():
    assert kept("sequential", quota=2) == [0, 1]
    assert kept("sequential", [False, True, False, True], quota=1) == [1]


def test_random_keeps_the_lowest_numbers():
    assert kept("random", quota=2) == [2, 3]


@pytest.mark.parametrize(
    ("threshold", "quota", "positions"),
    [
        (0.8, 1, [1, 3]),
        (0.9, 1, [1]),  # 0.9 is not strictly above 0.9
        (0.9, 2, [1, 3]),  # one above, the quota asks for two
        (0.99, 1, [1]),  # none above: the quota
        (0.0, 1, [0, 1, 2, 3]),
    ],
)
def test_dynamic_keeps_what_is_above_or_the_quota(threshold, quota, positions):
    assert kept("low_confidence_dynamic", quota=quota, setting=threshold) == positions


def test_dynamic_does_not_count_what_is_given():
    assert kept("low_confidence_dynamic", [True, False, True, True], setting=0.8) == [3]
    assert kept("low_confidence_dynamic", [True, False, True, False], setting=0.8) == [0]


@pytest.mark.parametrize(
    ("bound", "positions"),
    [(0.0, [1]), (0.05, [1]), (0.31, [1, 3]), (0.30, [1]), (0.8, [0, 1, 3]), (9.0, [0, 1, 2, 3])],
)
def test_entropy_bounded_keeps_the_sum_below_the_bound(bound, positions):
    assert kept("entropy_bounded", setting=bound) == positions


def test_entropy_bounded_sums_masked_positions_alone():
    assert kept("entropy_bounded", [True, False, True, False], setting=1.5) == [0, 2]
    assert kept("entropy_bounded", [True, False, True, False], setting=1.3) == [0]


def test_names_and_codes_are_unique():
    spellings = [name for s in STRATEGIES.values() for name in (s.name, s.short) if name]
    assert len(set(spellings)) == len(spellings)
    assert len(set(codes().values())) == len(STRATEGIES)
    assert {full_name(s.short) for s in STRATEGIES.values() if s.short} <= set(STRATEGIES)


def test_each_is_steered_by_a_setting_that_requests_have():
    assert {strategy.setting for strategy in STRATEGIES.values()} <= {*DECODING_SETTINGS, None}
    assert all(strategy.source for strategy in STRATEGIES.values())


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=lambda strategy: strategy.name)
def test_each_declares_what_it_uses(strategy):
    """On random batches, the rules' results depend on the declared inputs only."""
    torch.manual_seed(0)
    rows, block = 64, 8
    masked = torch.rand(rows, block) < 0.7
    masked[:, 0] = True
    confidence, entropy, number, again = torch.rand(4, rows, block)
    quota, setting = torch.randint(1, block + 1, (rows,)), torch.rand(rows)
    if strategy.setting and isinstance(getattr(DecodingConfig(), strategy.setting), int):  # a number of tokens
        setting = quota.flip(0).float()
    drawn = []

    def rules(entropy, number):
        candidates = Candidates(
            masked, confidence, entropy, torch.arange(block), quota, setting, lambda: drawn.append(1) or number
        )
        return strategy.order(candidates), strategy.count(candidates)

    def differ(one, other):
        return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))

    keys, count = results = rules(entropy, number)
    assert keys.shape == masked.shape and keys.dtype == torch.float32
    assert count.shape == quota.shape and count.dtype == torch.int64 and int(count.min()) >= 1
    assert strategy.is_random == bool(drawn) == differ(results, rules(entropy, again))
    assert strategy.needs_entropy == differ(results, rules(again, number))
    assert strategy.uses_schedule == bool((count >= quota).all())


def test_the_folder_is_the_list():
    folder = ROOT / "sdar_lm_eval" / "engines" / "native" / "strategies"
    assert {file.stem for file in folder.glob("*.py")} - {"__init__", "base"} == set(STRATEGIES)


def test_other_engines_take_none_but_these():
    theirs = {name for known in (*ENGINES.values(), *versions.DIALECTS.values()) for name in known.strategies or ()}
    assert theirs <= set(STRATEGIES)


def test_names_are_read_without_torch():
    code = "import sys, sdar_lm_eval.engines.native.strategies as s; print(len(s.STRATEGIES), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [str(len(STRATEGIES)), "False"]


@pytest.mark.parametrize("page", ["README.md", "docs/strategies.md"])
def test_pages_name_them(page):
    """Each has a row of a table, with its short name in the next cell."""
    rows = [line.split("|") for line in (ROOT / page).read_text("utf-8").splitlines() if line.startswith("| `")]
    named = {re.findall(r"`(\w+)`", row[1])[0]: re.findall(r"`(\w+)`", row[2]) for row in rows}
    for strategy in STRATEGIES.values():
        assert named[strategy.name] == ([strategy.short] if strategy.short else [])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with a head size that the fused decoder supports."""
    return Checkpoint.open(str(random_checkpoint(tmp_path_factory.mktemp("small"), head_dim=64, num_hidden_layers=1)))


def compile_as_a_gpu_does(monkeypatch):
    """Make engines on the CPU compile the transitions of a step, with the backend that runs PyTorch's operations."""
    make = Runner.__init__

    def compiling(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.compile(backend="eager")

    monkeypatch.setattr(Runner, "__init__", compiling)


class TestOneFileMore:
    """A strategy that consists of one file in the folder of strategies decodes by its own rule."""

    NAME = "two_least_confident"
    FILE = """
from sdar_lm_eval.engines.native.strategies.base import Strategy


def least_confident_first(candidates):
    return candidates.confidence


def two(candidates):
    return candidates.quota.new_full(candidates.quota.shape, 2)


STRATEGY = Strategy(
    name="two_least_confident", short="timid", source="this test", order=least_confident_first, count=two,
    uses_schedule=False,
)
"""

    @pytest.fixture(autouse=True)
    def added(self, monkeypatch, tmp_path):
        (tmp_path / f"{self.NAME}.py").write_text(self.FILE)
        monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
        found = strategies.discover()
        monkeypatch.delitem(sys.modules, f"{strategies.__name__}.{self.NAME}")
        assert found.keys() - STRATEGIES.keys() == {self.NAME}
        monkeypatch.setitem(STRATEGIES, self.NAME, found[self.NAME])

    def requests(self, names, **settings):
        """Requests with blocks of 8 and a schedule of 3 steps, so that results show whether the schedule is used."""
        decodings = [DecodingConfig(8, 3, n, confidence_threshold=0.01, eb_threshold=9.0, **settings) for n in names]
        return [
            GenerationRequest(tuple(range(5, 10 + 3 * i)), 13, decoding, seed=i, record_steps=True)
            for i, decoding in enumerate(decodings)
        ]

    def check(self, checkpoint, requests, engine, monkeypatch):
        keep = oracle.keep

        def keep_two(candidates, request, start, step):
            if request.decoding.remasking_strategy != self.NAME:
                return keep(candidates, request, start, step)
            return sorted(candidates, key=lambda position: (candidates[position][1], position))[:2]

        monkeypatch.setattr(oracle, "keep", keep_two)
        model = checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
        for request, result in zip(requests, run(engine, requests), strict=True):
            tokens, reason, unmasked_at, _, _ = oracle.generate(model, checkpoint.mask_token_id, request)
            assert (list(result.token_ids), result.finish_reason) == (tokens, reason)
            assert list(result.unmasked_at) == unmasked_at
            if request.decoding.remasking_strategy == self.NAME:
                assert max(unmasked_at) == 3  # two of eight tokens a step; the schedule would need only 3 steps

    @pytest.mark.parametrize("temperature", [0, 1.0])
    @pytest.mark.parametrize("others", [False, True], ids=["alone", "beside all others"])
    def test_without_kernels(self, checkpoint, monkeypatch, others, temperature):
        requests = self.requests(
            [*oracle.STRATEGIES, self.NAME] if others else [self.NAME] * 3, temperature=temperature
        )
        self.check(checkpoint, requests, make_engine("native", checkpoint, device="cpu"), monkeypatch)

    @pytest.mark.parametrize(
        "others",
        [pytest.param(False, id="alone"), pytest.param(True, id="beside all others", marks=pytest.mark.slow)],
    )
    def test_with_kernels(self, checkpoint, monkeypatch, others):
        pytest.importorskip("triton")
        engine = make_engine("native", checkpoint, device="cpu", kernels=True)
        assert engine.runner.forward.captures
        names = [*oracle.STRATEGIES, self.NAME] if others else [self.NAME]
        self.check(checkpoint, self.requests(names, temperature=0), engine, monkeypatch)

    @pytest.mark.slow
    def test_a_gpu_compiles_its_rule(self, checkpoint, monkeypatch):
        """Only the compiler's front end runs here; it refuses the same rules as on a GPU."""
        compile_as_a_gpu_does(monkeypatch)
        requests = self.requests([*oracle.STRATEGIES, self.NAME], temperature=1.0)
        self.check(checkpoint, requests, make_engine("native", checkpoint, device="cpu"), monkeypatch)

    def test_is_named_where_names_are(self):
        assert read_generation({"strategy": "timid"}, {}).decoding.remasking_strategy == self.NAME
        with pytest.raises(
            UserError, match=r"choose one of .*, two_least_confident \(or timid\)\. Did you mean 'two_least_conf"
        ):
            DecodingConfig(remasking_strategy="two_least_confidant")
        assert f"{self.NAME} (or timid)" in strategies.spellings()
