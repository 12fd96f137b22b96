"""Runs of two processes on the CPU: the same losses as one, checkpoints for any number, and a clean end if one dies."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moeft
from moeft.config import SftRecipe
from moeft.errors import RecipeError, RunFolderError
from moeft.integration.trained_roles import train_roles
from moeft.provenance import RunFolder
from moeft.runs.sft import run
from moeft.training import trained_weights
from moeft.training.guards import NonFiniteGuard
from moeft.training.trained_weights import FILE
from tests.tiny_models import save_tiny_model, token_ids
from tests.tiny_training import load, sums, tiny_tokenizer

# Two processes sum the gradients of two half batches: some 1,000 float32 terms in another order, as in test_trainer.py,
# and an epsilon that does not divide small gradients by themselves. 3e-7 was seen after four steps.
LOSS_BOUND = 1e-5
FULL = {"train": ["attention", "norms"]}
LORA = {"quantization": {}, "lora": {"rank": 4}}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
OFFLOADED = {"device": "cpu"}
ZERO3 = {
    "deepspeed": {
        "zero_optimization": {"stage": 3, "offload_optimizer": OFFLOADED, "offload_param": OFFLOADED},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
}
WITHOUT_DEEPSPEED = importlib.util.find_spec("deepspeed") is None or shutil.which("ninja") is None
needs_deepspeed = pytest.mark.skipif(
    WITHOUT_DEEPSPEED,
    reason="needs DeepSpeed, and ninja on the path to build its CPU part: pip install deepspeed ninja",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny_model("gemma4", tmp_path_factory.mktemp("base"))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recipe(folder, base, processes=2, **changes):
    """A recipe of four steps with four rows each, shared by the processes; 22 held-out rows, which do not divide."""
    folder.mkdir(exist_ok=True)
    for name, count in (("train", 24), ("heldout", 22)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(count)))
    training = {
        "max_steps": 4,
        "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 4,
        "learning_rate": 5e-3,
        "adam_epsilon": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    content = {
        "model": str(base),
        "output": str(folder / "run"),
        "dtype": "float32",
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "heldout.jsonl")},
    }
    path = folder / f"recipe-{processes}.yaml"
    path.write_text(yaml.safe_dump({**content, **changes, "training": training | changes.get("training", {})}))
    return path


def launch(path, processes=2):
    """Start ``moeft sft`` in processes of one thread; one port for rendezvous is found by torch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [*command, "-m", "moeft.cli", "sft", str(path)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=path.parent,
    )


def finish(path, processes=2):
    process = launch(path, processes)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return RunFolder.open(SftRecipe.load(path).output)


def losses(folder):
    return [event["loss"] for event in folder.events("train_log")]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """Runs of one process in this one."""
    root = tmp_path_factory.mktemp("alone")
    return {
        name: run(SftRecipe.load(recipe(root / name, base, 1, **changes)), show=lambda text: None)
        for name, changes in (("full", FULL), ("lora", LORA))
    }


def assert_same_figures(folder, expected):
    assert losses(folder) == pytest.approx(losses(expected), rel=LOSS_BOUND)
    found, wanted = (done.read_json("metrics.json") for done in (folder, expected))
    for when in ("before", "after"):
        assert found["heldout"][when]["loss"] == pytest.approx(wanted["heldout"][when]["loss"], rel=LOSS_BOUND)
    assert found["training"]["tokens"] == wanted["training"]["tokens"]
    assert found["training"]["routing"] == wanted["training"]["routing"]


def assert_was_sharded(folder):
    """FSDP's optimiser state has a file of its own; accelerate falls back to DDP on CPUs without a word."""
    assert (folder.path / "checkpoints" / "checkpoint-4" / "optimizer.bin").is_file()


def shapes(path):
    return {name: value.shape for name, value in load_file(path).items()}


@pytest.mark.slow
def test_packed_experts_with_lora_under_ddp_equal_one_process(base, alone, tmp_path):
    folder = finish(recipe(tmp_path, base, **LORA))
    assert_same_figures(folder, alone["lora"])
    assert not any(event["changed"] for event in folder.events("frozen_base"))
    adapted = moeft.load_adapter(load(base, quantization_config=moeft.NF4Config()), folder.path / "adapter")
    assert torch.isfinite(adapted(input_ids=token_ids()).logits).all()


@pytest.mark.slow
def test_attention_in_full_under_fsdp_equals_one_process_and_leaves_an_ordinary_folder(base, alone, tmp_path):
    merge = {"merge": {"output": str(tmp_path / "tuned"), "out_dtype": "float32"}}
    folder = finish(recipe(tmp_path, base, **FULL, **merge, training=FSDP))
    assert_same_figures(folder, alone["full"])
    assert_was_sharded(folder)
    trained, expected = (load_file(done.path / "trained" / FILE) for done in (folder, alone["full"]))
    assert trained.keys() == expected.keys()
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32).state_dict()
    for name, value in trained.items():
        assert torch.equal(tuned[name], value), name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    drift = folder.read_json("metrics.json")["router_drift"]
    assert drift["tokens"] == alone["full"].read_json("metrics.json")["router_drift"]["tokens"]


@pytest.mark.slow
@needs_deepspeed
def test_attention_in_full_under_zero3_equals_one_process_and_leaves_an_ordinary_folder(base, alone, tmp_path):
    merge = {"merge": {"output": str(tmp_path / "tuned"), "out_dtype": "float32"}}
    folder = finish(recipe(tmp_path, base, **FULL, **merge, training=ZERO3))
    assert_same_figures(folder, alone["full"])
    assert len(list((folder.path / "checkpoints" / "checkpoint-4" / "global_step4").glob("*_optim_states.pt"))) == 2
    trained = load_file(folder.path / "trained" / FILE)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32).state_dict()
    for name, value in load_file(alone["full"].path / "trained" / FILE).items():
        assert torch.equal(tuned[name], trained[name]), name
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-4)
    # What two processes saved is whole, and one loads it.
    model = load(base)
    train_roles(model, FULL["train"])
    trained_weights.load(model, folder.path / "checkpoints" / "checkpoint-4")
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters() if name in trained)


@pytest.mark.slow
@needs_deepspeed
def test_best_weights_come_back_under_zero3(base, tmp_path):
    best = {"save_steps": 1, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    # The loss falls, so the first checkpoint is the best if a large one is wanted.
    best |= {"load_best_model_at_end": True, "greater_is_better": True}
    # Small weights are left whole by default.
    stage = ZERO3["deepspeed"]["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
    engine = {"deepspeed": ZERO3["deepspeed"] | {"zero_optimization": stage}}
    folder = finish(recipe(tmp_path, base, **FULL, training=engine | best))
    kept = load_file(folder.path / "checkpoints" / "checkpoint-1" / FILE)
    last = load_file(folder.path / "checkpoints" / "checkpoint-3" / FILE)
    trained = load_file(folder.path / "trained" / FILE)
    assert trained.keys() == kept.keys()
    assert all(torch.equal(trained[name], weight) for name, weight in kept.items())
    assert not all(torch.equal(last[name], weight) for name, weight in kept.items())


def test_deepspeed_that_accelerate_would_leave_out_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(RecipeError, match=r"accelerate starts DDP instead; unset it, and set training\.use_cpu: true"):
        run(SftRecipe.load(recipe(tmp_path, base, **FULL, training=ZERO3)))


def test_packed_weights_under_deepspeed_are_refused(base, tmp_path):
    with pytest.raises(RecipeError, match="take DDP or FSDP 2, which replicate packed weights"):
        run(SftRecipe.load(recipe(tmp_path, base, **LORA, training=ZERO3)))


@pytest.mark.slow
def test_packed_experts_with_lora_under_fsdp_equal_one_process(base, alone, tmp_path):
    folder = finish(recipe(tmp_path, base, **LORA, training=FSDP))
    assert_same_figures(folder, alone["lora"])
    assert_was_sharded(folder)
    found, expected = (shapes(done.path / "adapter" / "adapter_model.safetensors") for done in (folder, alone["lora"]))
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("engine", [FSDP, pytest.param(ZERO3, marks=needs_deepspeed)], ids=["fsdp", "zero3"])
def test_run_that_loses_a_process_ends_at_once_and_continues(base, alone, tmp_path, engine):
    path = recipe(tmp_path, base, **FULL, training={**engine, "max_steps": 20, "save_steps": 1})
    process = launch(path)
    first = Path(tmp_path / "run" / "checkpoints" / "checkpoint-1" / "trainer_state.json")
    while not first.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children()
    workers[-1].send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(worker.is_running() for worker in workers)
    with pytest.raises(RunFolderError, match=r"processes was 2, is now 1"):
        run(SftRecipe.load(path), show=lambda text: None)
    folder = finish(path)
    assert folder.status == "finished"
    assert folder.read_json("metrics.json")["training"]["resumed_from"] is not None
    # Schedules differ from the second step on.
    assert losses(folder)[:2] == pytest.approx(losses(alone["full"])[:2], rel=LOSS_BOUND)


def drop_together(rank, store):
    """One process of two: only the second sees a loss that is not finite; its gradients are fine."""
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    guard = NonFiniteGuard(patience=3)
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    guard.see_loss(torch.tensor(float("nan") if rank else 1.0), {})
    optimizer = torch.optim.SGD([weight])
    guard.on_pre_optimizer_step(SimpleNamespace(device=torch.device("cpu")), state, None, optimizer=optimizer)
    assert weight.grad is None
    assert guard.skipped_steps == 1
    torch.distributed.destroy_process_group()


def test_step_that_is_bad_in_one_process_is_skipped_in_all(tmp_path):
    torch.multiprocessing.spawn(drop_together, (tmp_path / "store",), nprocs=2)
