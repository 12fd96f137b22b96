"""What a GPU that is too small or too old is told; nothing here needs one."""

from __future__ import annotations

import pytest
import torch

import moeft
from moeft.integration.streaming import slot_bytes, stream_experts, streamed_bytes
from moeft.kernels import dispatch
from moeft.kernels.out_of_memory import naming
from moeft.training.out_of_memory import explain, held_bytes
from tests.tiny_training import load


def full(part="the loss head", knob="chunk_rows below 9"):
    with naming(part, knob):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_part_that_ran_out_is_named_once_with_its_knob(checkpoints):
    with pytest.raises(torch.OutOfMemoryError) as caught, naming("a whole step", "nothing"):
        full()
    assert caught.value.__notes__ == ["in the loss head: chunk_rows below 9"]
    model = load(checkpoints["olmoe"], quantization_config=moeft.NF4Config())
    message = str(explain(caught.value, model, None, 3))
    assert message.startswith(
        "out of memory in step 3: CUDA out of memory. Tried to allocate 2.00 GiB\n"
        "in the loss head: chunk_rows below 9\nheld: "
    )


def test_other_errors_pass_as_they_are():
    with pytest.raises(KeyError) as caught, naming("a block", "less"):
        raise KeyError("a")
    assert not hasattr(caught.value, "__notes__")


def test_streaming_is_the_knob_of_packed_experts_until_they_are_streamed(checkpoints):
    packing = moeft.NF4Config(attention=True)
    error = torch.OutOfMemoryError("CUDA out of memory")
    model = load(checkpoints["gpt_oss"], quantization_config=packing)
    before = held_bytes(model, None)
    model.get_input_embeddings().weight.data = torch.zeros(1)  # so that experts are the largest part
    assert "for packed experts: stream them from host memory: memory.experts: stream" in str(
        explain(error, model, None, 1)
    )
    stream = stream_experts(model, "cpu")
    held = held_bytes(model, None)
    assert "memory.experts: stream" not in str(explain(error, model, None, 1))
    assert held["expert slots"] == stream.ring.num_bytes == slot_bytes(model)
    assert before["experts"] - held["experts"] == streamed_bytes(model) > 0


def test_memory_is_explained_where_components_are_not_known(checkpoints):
    model = load(checkpoints["olmoe"], quantization_config=moeft.NF4Config())
    model.config.model_type = "unheard"
    first = model.model.layers[0]
    first.feed_forward = first._modules.pop("mlp")  # experts in two places: a family that attributes do not tell
    before = held_bytes(model, None)
    assert before["model"] == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    stream = stream_experts(model, "cpu")
    held = held_bytes(model, None)
    assert before["model"] - held["model"] == streamed_bytes(model) > 0
    assert held["expert slots"] == stream.ring.num_bytes
    text = str(explain(torch.OutOfMemoryError("CUDA out of memory"), model, None, 1))
    assert "held: model 0.00 GiB" in text
    assert "for activations and temporaries: turn on gradient_checkpointing" in text


@pytest.mark.parametrize(("capability", "obstacle"), [((7, 5), "Tesla T4 is sm_75"), ((8, 0), None)])
def test_gpus_before_sm_80_take_pytorch_and_say_so(monkeypatch, caplog, capability, obstacle):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    dispatch._find_obstacle.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            taken = dispatch.has_triton(torch.device("cuda", 0))
        monkeypatch.setenv("MOEFT_KERNELS", "triton")
        if obstacle is None:
            assert taken
            return
        assert not taken
        assert f"{obstacle}, and Triton's kernels need sm_80 or newer" in caplog.text
        assert "restored from 4 bits and multiplied by PyTorch" in caplog.text
        with pytest.raises(ValueError, match=f"MOEFT_KERNELS is 'triton', but {obstacle}.*set it to 'pytorch'"):
            dispatch.has_triton(torch.device("cuda", 0))
    finally:
        dispatch._find_obstacle.cache_clear()
