"""Plans that stream experts: how many layers stay, what crosses the bus, and that a stream takes what was planned."""

from __future__ import annotations

import pytest

import moeft
from moeft.config.memory import Memory
from moeft.config.sft import Lora, Quantization
from moeft.integration.streaming import stream_experts
from moeft.planning import Settings, plan
from moeft.planning.streaming import saved_bytes, solve
from tests.test_planning import GEMMA_26B
from tests.tiny_training import load

CONFIG = {"model_type": "gemma4_text", **GEMMA_26B}
SMALL = {
    "quantization": Quantization(attention=True, mlp=True, double_quant=True),
    "lora": Lora(targets=("attention",)),
    "max_length": 4096,
    "optimizer": "adamw_moeft_host",
}
STREAM = Settings(**SMALL, memory=Memory(experts="stream"))


@pytest.mark.parametrize("vram", ["8GiB", "10GiB", "12GiB", "16GiB"])
def test_most_layers_stay_that_fit(vram):
    result = plan(CONFIG, vram, STREAM)
    found = result.streaming
    assert result.fits
    assert result.device_bytes + found.layer_bytes > result.vram_bytes or found.resident == found.layers - 1
    experts = result.bytes_of("experts") + found.host_bytes
    assert experts == plan(CONFIG, vram, Settings(**SMALL)).bytes_of("experts")
    assert result.bytes_of("expert slots") == found.slot_bytes == 2 * found.layer_bytes


def test_a_26b_model_trains_on_12_gib_with_hidden_transfers():
    found = plan(CONFIG, "12GiB", STREAM, device="RTX 3060").streaming
    assert found.resident >= 14
    assert found.micro_batch_bytes == 2 * (found.layers - found.resident - 2) * found.layer_bytes
    assert found.rows_that_hide == 1
    assert "hidden behind" in str(plan(CONFIG, "12GiB", STREAM, device="RTX 3060"))


def test_transfers_are_hidden_from_the_rows_on_that_the_plan_names():
    def found(rows):
        settings = Settings(**SMALL | {"max_length": 64, "batch_size": rows}, memory=Memory(experts="stream"))
        return plan(CONFIG, "8GiB", settings, device="RTX 4090").streaming

    one = found(1)
    rows = one.rows_that_hide
    assert rows > 2
    assert found(rows - 1).compute_seconds < one.transfer_seconds <= found(rows).compute_seconds
    assert f"not hidden behind {one.compute_seconds:.2f} s of computation" in str(one)
    assert one.compute_seconds < one.transfer_seconds


def test_auto_streams_only_what_does_not_fit():
    auto = Settings(**SMALL, memory=Memory(experts="auto", vram="24GiB"))
    assert plan(CONFIG, recipe=auto).streaming is None
    assert plan(CONFIG, recipe=auto).vram_bytes == 24 << 30
    assert plan(CONFIG, "12GiB", auto).streaming.resident < 30
    assert plan(CONFIG, recipe=Settings(memory=Memory(experts="auto"))).streaming is None  # no card is known
    assert plan(CONFIG, recipe=STREAM).streaming.resident == 0


def test_a_card_that_is_too_small_for_none_is_said_to_be():
    result = plan(CONFIG, "3GiB", STREAM)
    assert result.streaming.resident == 0
    assert result.fits is False


def test_experts_that_are_not_packed_are_not_streamed():
    result = plan(CONFIG, "12GiB", Settings(quantization=None, memory=Memory(experts="stream")))
    assert result.streaming is None
    assert "streams packed experts, and this model has none" in str(result)


def test_several_gpus_do_not_stream():
    with pytest.raises(ValueError, match=r"memory\.experts is 'stream', expected 'resident' on 2 GPUs"):
        plan(CONFIG, recipe=STREAM, gpus=2)


@pytest.mark.parametrize("resident", range(5))
def test_solver_gives_the_most_layers_that_fit(resident):
    expert_bytes = [100, 90, 100, 80, 100]
    held = 1000 - saved_bytes(expert_bytes, resident) if resident < 5 else 1000
    assert solve(expert_bytes, 1000, held) >= resident
    assert solve(expert_bytes, 1000, 0) is None


def test_biases_of_experts_stay_on_the_card(checkpoints):
    settings = {"dtype": "float32"}
    whole = plan(checkpoints["gpt_oss"], recipe=Settings(**settings))
    found = plan(checkpoints["gpt_oss"], recipe=Settings(**settings, memory=Memory(experts="stream")))
    assert found.bytes_of("experts") == 0
    assert found.bytes_of("other") == whole.bytes_of("other") > 0
    assert found.streaming.host_bytes == whole.bytes_of("experts")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("resident", [0, 2])
def test_a_stream_takes_the_bytes_that_were_planned(checkpoints, double_quant, resident):
    model = load(checkpoints["gemma4"], quantization_config=moeft.NF4Config(double_quant=double_quant))
    stream = stream_experts(model, "cpu", resident)
    settings = Settings(quantization=Quantization(double_quant=double_quant), dtype="float32")
    whole = plan(checkpoints["gemma4"], recipe=settings)
    vram = whole.device_bytes - saved_bytes([whole.bytes_of("experts") // 3] * 3, resident)
    found = plan(checkpoints["gemma4"], vram, Settings(**{**vars(settings), "memory": Memory(experts="stream")}))
    assert found.streaming.resident == resident == len(stream.resident)
    padding = 8 * 256 * 3  # of tensors to aligned addresses
    assert 0 <= stream.ring.num_bytes - found.streaming.slot_bytes <= padding
    assert 0 <= stream.host_bytes - found.streaming.host_bytes <= padding
