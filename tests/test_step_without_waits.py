"""A training step asks nothing of the device: on the meta device there is no number that it could be told."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moeft
from moeft.integration.checkpointing import POLICIES, apply_checkpointing
from moeft.integration.document_reading import attend_inside_documents
from moeft.integration.fused_loss import fuse_loss
from moeft.integration.fused_norms import fuse_norms
from moeft.kernels import dispatch, tuning
from moeft.kernels.grouped_linear import config, gpu
from moeft.kernels.nf4 import gpu as nf4_gpu
from moeft.training import readback
from moeft.training.document_isolation import check_document_isolation
from tests.tiny_preferences import dpo_trainer
from tests.tiny_training import load, sft_trainer

triton_targets = pytest.importorskip("tests.triton_targets", reason="needs Triton: pip install triton")
TOKENS = 24


@pytest.fixture
def gpu_without_numbers(monkeypatch):
    """The way of a GPU, on the meta device; launches are counted instead of made."""
    monkeypatch.setattr(dispatch, "_obstacle", lambda device: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: nullcontext())
    names: list[str] = []
    with triton_targets.counted(names):
        yield names


def trained(folder, dtype=torch.float32):
    model = load(folder, quantization_config=moeft.NF4Config(attention=True)).to(dtype)
    check_document_isolation(model)
    fuse_loss(model)
    assert fuse_norms(model)
    return moeft.add_lora(model, 4, targets=("attention", "experts")).train()


def step(model, **options):
    """Forward and backward of two packs of two examples each."""
    ids = torch.ones(2, TOKENS, dtype=torch.int64, device="meta")
    positions = torch.arange(TOKENS // 2, device="meta").repeat(2).expand(2, -1)
    loss = model(input_ids=ids, position_ids=positions, labels=ids, num_items_in_batch=2 * TOKENS, **options).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_step_on_packs_reads_no_number_of_the_device(checkpoints, name, policy, gpu_without_numbers):
    model = trained(checkpoints[name])
    apply_checkpointing(model, policy)
    loss = step(model.to("meta"))
    assert loss.shape == ()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert "log_probs_kernel" in gpu_without_numbers


class Unread(readback.Readback):
    """Numbers that a device without numbers sends, and nobody reads."""

    def send(self, values):
        assert values.device.type == "meta"


BATCHES = {
    "packs": {"position_ids": torch.arange(TOKENS // 2, device="meta").repeat(2).expand(2, -1)},
    "padded rows": {"attention_mask": torch.ones(2, TOKENS, dtype=torch.int64, device="meta")},
}


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_step_of_the_trainer_reads_no_number_of_the_device(
    checkpoints, tmp_path, name, rows, gpu_without_numbers, monkeypatch
):
    """All that runs between two readings: model, routing counts, throughput, clipping, guard, optimiser, schedule."""
    monkeypatch.setattr(readback, "reads_late", lambda device: True)
    monkeypatch.setattr(readback, "Readback", Unread)
    options = {"optim": "adamw_moeft_stochastic", "check_frozen_base": False, "gradient_accumulation_steps": 2}
    trainer = sft_trainer(trained(checkpoints[name]), tmp_path, packing=rows == "packs", **options)
    monkeypatch.setattr(moeft.SFTConfig, "device", torch.device("meta"))
    model = trainer.model.to("meta")
    trainer.create_optimizer_and_scheduler(2)
    handler, run = trainer.callback_handler, (trainer.args, trainer.state, trainer.control)
    handler.optimizer, handler.model = trainer.optimizer, model
    handler.on_train_begin(*run)
    handler.on_step_begin(*run)
    ids = torch.ones(2, TOKENS, dtype=torch.int64, device="meta")
    batch = {"input_ids": ids, "labels": ids, **BATCHES[rows]}
    steps = [trainer.training_step(model, batch, num_items_in_batch=4 * TOKENS) for _ in range(2)]
    assert sum(steps).device.type == "meta"
    assert trainer._clip_grad_norm(model).device.type == "meta"
    handler.on_pre_optimizer_step(*run)
    trainer.optimizer.step()
    handler.on_optimizer_step(*run)
    trainer.lr_scheduler.step()
    handler.on_step_end(*run)
    assert len(trainer.optimizer.state) == len([p for p in model.parameters() if p.requires_grad])
    assert trainer.guard._unread.step == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_step_that_is_told_of_documents_reads_none_and_makes_no_mask(checkpoints, name, policy, gpu_without_numbers):
    model = trained(checkpoints[name], torch.bfloat16)
    assert attend_inside_documents(model) is None
    apply_checkpointing(model, policy)
    with SizesOfResults() as sizes:
        step(model.to("meta"), documents=[[TOKENS // 2] * 2, [TOKENS - 1, 1]])
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert "torch_attn::_varlen_attn" in sizes.names
    assert not [shape for shape in sizes.found if shape[-2:] == (TOKENS, TOKENS)]


class SizesOfResults(TorchDispatchMode):
    """Names and shapes of all that is computed."""

    def __init__(self):
        super().__init__()
        self.names, self.found = set(), set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.names.add(function.name())
        self.found |= {x.shape for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        return result


def test_layers_share_masks_that_attention_adds_as_they_are(checkpoints, gpu_without_numbers):
    """A bool mask would be converted, and kept for backward, in every layer of its own."""
    model = trained(checkpoints["gemma4"]).to("meta")
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["attention_mask"]), with_kwargs=True)
    step(model)
    assert {mask.dtype for mask in seen} == {model.get_input_embeddings().weight.dtype}
    assert len(seen) == 3
    assert len({id(mask) for mask in seen}) == 2  # one for each kind


def test_masks_of_transformers_would_read_one(checkpoints, gpu_without_numbers):
    """That the test above can fail."""
    model = trained(checkpoints["gemma4"])
    model.get_base_model().model._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="meta tensors"):
        step(model.to("meta"))


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_preference_pairs_read_no_number_of_the_device(checkpoints, tmp_path, layout, gpu_without_numbers, monkeypatch):
    trainer = dpo_trainer(trained(checkpoints["gemma4"]), tmp_path, layout=layout, check_frozen_base=False)
    assert trainer.layout == layout
    monkeypatch.setattr(moeft.DPOConfig, "device", torch.device("meta"))
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(2)])
    batch = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    loss = trainer.training_step(trainer.model.to("meta"), batch, num_items_in_batch=2)
    assert loss.device.type == "meta"
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)


class FromHost(TorchDispatchMode):
    """Operations that bring numbers from host memory to a GPU, which waits for it; single numbers go with a launch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), keywords=None):
        result = function(*args, **(keywords or {}))
        given, made = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, keywords), result))
        if any(t.device.type == "cpu" and t.ndim for t in given) and any(t.device.type == "cuda" for t in made):
            self.found.append(str(function))
        return result


def as_if_on_a_gpu(model):
    """Replace all tensors of a model by fake ones on a GPU; inside of a mode that makes such."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
                    tensors[name] = torch.nn.Parameter(new, old.requires_grad) if tensors is module._parameters else new


def forget_tensors():
    """Those that kernels keep on a device: fake ones are not for other tests, nor real ones for these."""
    gpu.release_workspaces()
    nf4_gpu.code_values.cache_clear()
    nf4_gpu._dynamic_map.cache_clear()


@pytest.fixture
def nothing_kept():
    forget_tensors()
    yield
    forget_tensors()


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.skipif(torch.version.cuda is None, reason="fake tensors on a GPU need a build of PyTorch for CUDA")
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe", "gpt_oss"])
def test_forward_brings_nothing_from_host_memory(checkpoints, name, rows, gpu_without_numbers, monkeypatch):
    """What the meta device cannot show: there, a copy from the host is free."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(config, "workspace_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(tuning, "lookup", lambda key, device, candidates: candidates[0])
    model = trained(checkpoints[name])
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        as_if_on_a_gpu(model)
        ids = torch.ones(2, TOKENS, dtype=torch.int64, device="cuda")
        batch = {key: torch.ones(2, TOKENS, dtype=torch.int64, device="cuda") for key in BATCHES[rows]}
        batch |= {"input_ids": ids, "labels": ids, "num_items_in_batch": 2 * TOKENS}
        assert model(**batch).loss.device.type == "cuda"  # tables of codes come once
        with FromHost() as copies:
            model(**batch)
    assert copies.found == []


@pytest.mark.skipif(torch.version.cuda is None, reason="fake tensors on a GPU need a build of PyTorch for CUDA")
def test_copies_from_host_memory_would_be_found():
    """That the test above can fail."""
    with FakeTensorMode(), FromHost() as copies:
        torch.tensor([1, 2], device="cuda")
        torch.ones(2).to("cuda")
    assert len(copies.found) == 2
