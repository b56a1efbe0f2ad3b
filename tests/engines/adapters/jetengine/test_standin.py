"""The stand-ins have JetEngine's faults; without them, the adapter's tests would prove nothing."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import shutil

import pytest
import torch
import torch.distributed as dist
from jetengine_standin import standin
from support import random_checkpoint, read_weights
from transformers import AutoConfig

from sdar_lm_eval.engines.adapters.jetengine.config import SDARConfig

STATIC = {"block_length": 4, "remasking_strategy": "low_confidence_static", "topk": 1}


def opened(folder, **options):
    """JetEngine's LLM as a careless user opens it; 0.2.0 starts only where there is a process group."""
    jetengine = importlib.import_module("jetengine")
    AutoConfig.register("sdar", SDARConfig, exist_ok=True)
    options = {"mask_token_id": 710, "max_model_len": 600, "max_num_seqs": 8, "nobody_reads_this": 1, **options}
    return jetengine.LLM(str(folder), **options), jetengine.SamplingParams


@pytest.fixture
def folder(tmp_path, tiny):
    target = tmp_path / "checkpoint"
    shutil.copytree(tiny.folder, target)
    return target


@pytest.fixture
def llm(jetengine, folder):
    if jetengine.version == "0.2.0":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made, params = opened(folder)
    made.version, made.params = jetengine.version, lambda **settings: params(**{**STATIC, **settings})
    return made


def test_without_a_process_group_020_does_not_start(jetengine_020, folder):
    with pytest.raises(ValueError, match="Default process group has not been initialized"):
        opened(folder)


def test_010_starts_once_in_a_process(jetengine_010, folder):
    llm, _ = opened(folder)
    with pytest.raises(ValueError, match="twice"):
        opened(folder)
    llm.exit()
    opened(folder)


def test_it_trusts_any_code(jetengine, folder, tmp_path):
    config = AutoConfig.for_model("qwen3").to_dict() | {
        "model_type": "sdar2",
        "auto_map": {"AutoConfig": "evil.Config"},
    }
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w')\nraise SystemExit\n")
    (folder / "config.json").write_text(__import__("json").dumps(config))
    with pytest.raises(SystemExit):
        opened(folder)
    assert (tmp_path / "was_here").exists()


def test_a_hub_id_is_no_folder(jetengine):
    with pytest.raises(AssertionError):
        opened("JetLM/SDAR-4B-Chat")


def test_whole_blocks_come_back_behind_the_prompt_or_the_answer_alone(llm):
    """0.2.0 also returns what follows a stop token in its block; 0.1.0 returns tokens up to the stop token."""
    prompt = [5, 6, 7, 8, 9]
    whole = llm.generate([prompt], llm.params(max_tokens=15))[0]["token_ids"][-15:]
    for limit, stops, answer in [(9, [], 9), (15, [whole[1]], whole.index(whole[1]) + 1)]:
        (output,) = llm.generate([prompt], llm.params(max_tokens=limit, stop_words=stops))
        if llm.version == "0.2.0":
            in_blocks = -(-(1 + answer) // 4) * 4 - 1  # the prompt has one token of the first block
            assert output["token_ids"] == prompt + whole[:in_blocks]
        else:
            assert output["token_ids"] == whole[:answer]


def test_results_are_numbered_by_a_counter_of_the_process(llm):
    llm.add_request([5], llm.params())
    first = llm.scheduler.running[-1].seq_id
    assert first > 0
    llm.add_request([5], llm.params())
    assert llm.scheduler.running[-1].seq_id == first + 1


def test_no_page_is_free(llm):
    """It stands still and keeps the sequences; in 0.2.0 they hold up the next call too."""
    llm.config.num_kvcache_blocks = 2
    llm.scheduler = type(llm.scheduler)(llm.config)
    llm.scheduler.consistent_sampling_params = True
    params, prompts = llm.params(max_tokens=12), [[i] * 250 for i in (5, 6)]
    if llm.version == "0.2.0":
        assert llm.generate(prompts, params) == []
        assert llm.generate([[1, 2], [3, 4]], params) == []
    else:
        for prompt in prompts:
            llm.add_request(prompt, params)
        outputs = [llm.step() for _ in range(100)]
        assert outputs[-1] == ([], 0)
        assert not any(finished for finished, _ in outputs)
    assert len(llm.scheduler.running) >= 2
    assert not llm.is_finished()


def test_topk_0_and_topk_1(llm):
    """0.2.0: topk=0 is greedy. 0.1.0: topk=0 is off, and topk=1 makes confidences 1, so that a block takes one step."""
    prompts = [[5]] * 12
    drawn = llm.generate(prompts, llm.params(topk=0, temperature=3.0, max_tokens=3, remasking_strategy="sequential"))
    different = len({tuple(output["token_ids"]) for output in drawn})
    assert (different == 1) == (llm.version == "0.2.0")
    llm.add_request(
        [5] * 4, llm.params(max_tokens=4, remasking_strategy="low_confidence_dynamic", dynamic_threshold=0.999)
    )
    steps = next(step for step in itertools.count(1) if llm.step()[0])
    assert (steps == 3) == (llm.version == "0.1.0")


def test_temperature_0(llm):
    with pytest.raises(ValueError, match="Temperature"):
        llm.generate([[5]], llm.params(temperature=0.0))


def test_settings_of_the_first_sequence_or_an_error(jetengine_020, folder):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    llm, params = opened(folder)
    greedy, hot = params(**STATIC, max_tokens=8), params(temperature=50.0, topk=711, max_tokens=8)
    with pytest.raises(ValueError, match="batch size mismatch"):
        llm.generate([[5], [5]], [greedy, hot])
    llm.scheduler = type(llm.scheduler)(llm.config)
    (alone,) = llm.generate([[5]], greedy)  # sets the scheduler's flag for good
    both = llm.generate([[5], [5]], [greedy, hot])
    assert [output["token_ids"] for output in both] == [alone["token_ids"]] * 2
    with pytest.raises(TypeError):
        llm.generate_streaming([[5]], greedy)
    assert llm.generate_streaming([[5]], greedy, max_active=1) == [alone]


def test_a_pad_token_in_a_prompt(llm):
    pad = llm.tokenizer.pad_token_id
    (output,) = llm.generate([[5, 6, pad, 7, 8]], llm.params(max_tokens=2))
    if llm.version == "0.2.0":
        assert output["token_ids"][:2] == [7, 8]
    else:
        assert output != llm.generate([[7, 8]], llm.params(max_tokens=2))[0]


def test_stop_tokens_of_010(jetengine_010, folder):
    """It stops at one among the prompt's last tokens, and at the end-of-text token though it is no stop token."""
    llm, params = opened(folder)
    outputs = llm.generate([[1, 2, 3, 4, 5]], params(**STATIC, stop_words=[5]))
    assert outputs[0]["token_ids"] == []
    eos = llm.tokenizer.eos_token_id
    assert llm.generate([[1, 2, 3, 4, eos]], params(**STATIC, stop_words=[]))[0]["token_ids"] == []
    assert len(llm.generate([[1, 2, 3, 4, eos]], params(**STATIC, ignore_eos=True))[0]["token_ids"]) == 64


def test_a_prompt_longer_than_there_is_room_for(jetengine_020, folder):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    llm, params = opened(folder, max_model_len=8)
    prompt = list(range(5, 17))
    (output,) = llm.generate([prompt], params(**STATIC, max_tokens=4))
    assert output["token_ids"] == prompt[:8]


def test_a_schedule_that_ends_with_masks_left(jetengine_020, folder):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    llm, params = opened(folder)
    settings = {**STATIC, "remasking_strategy": "entropy_bounded", "eb_threshold": 0.01, "denoising_steps": 1}
    (output,) = llm.generate([[5] * 4], params(**settings, max_tokens=4))
    assert output["token_ids"].count(710) == 3


def test_the_mask_id_of_010_is_the_tokenizers(jetengine_010, folder):
    llm, _ = opened(folder, mask_token_id=5)
    assert llm.config.mask_token_id == 710


def test_no_memory_for_a_page(jetengine, folder):
    if jetengine.version == "0.2.0":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(AssertionError):
        opened(folder, gpu_memory_utilization=0.001)
    assert torch.get_default_dtype() != torch.float32 or jetengine.version == "0.1.0"  # its config says float32
    assert str(torch.utils._device.CURRENT_DEVICE) == "meta"


def test_it_prints_and_leaves_a_default_device(jetengine_020, folder, capsys):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    opened(folder)
    assert "[KVCache]" in capsys.readouterr().out
    assert str(torch.utils._device.CURRENT_DEVICE) == "cpu"


def test_the_model_is_the_checkpoints(tmp_path):
    """Dense and with experts: logits of all tokens at once, and block by block, are those of transformers."""
    from sdar_lm_eval import Checkpoint

    for moe in (False, True):
        checkpoint = Checkpoint.open(str(random_checkpoint(tmp_path / str(moe), moe=moe, attention_bias=False)))
        model = checkpoint.load_model(dtype=torch.float32, device="cpu", attention="sdpa")
        ids = torch.randint(0, 700, (12,), generator=torch.Generator().manual_seed(0))
        block = torch.arange(12) // 4
        mask = (block[:, None] >= block)[None, None]
        expected = model(ids[None], attention_mask=mask).logits[0]
        with standin("0.1.0") as shared:
            config = dataclasses.make_dataclass("C", [(k, object) for k in checkpoint.config])(**checkpoint.config)
            mine = shared.Model(str(checkpoint.folder), config)
            assert mine.weights.keys() == read_weights(checkpoint.folder).keys()
            torch.testing.assert_close(mine.forward(ids.tolist(), None, 4)[0], expected, rtol=1e-3, atol=1e-4)
            logits, past = mine.forward(ids[:8].tolist(), None, 4)
            logits = torch.cat([logits, mine.forward(ids[8:].tolist(), past, 4)[0]])
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
