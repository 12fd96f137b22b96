"""Training beside the instruct subspace: what moves, what does not, and what is refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moeft
from moeft import importance
from moeft.config import Protection, SftRecipe
from moeft.config.sft import Lora
from moeft.errors import CheckpointError, RecipeError
from moeft.integration.trained_roles import train_roles
from moeft.planning import Settings, plan
from moeft.runs import preflight
from moeft.training import readback
from moeft.training.optim import HostAdamW
from moeft.training.protection import SubspaceProtection
from moeft.training.protection.projector import Projector, whole_float32
from moeft.training.range_test import range_test
from tests.test_trainer_guard import Fault, equal
from tests.tiny_models import save_tiny_model
from tests.tiny_training import (
    adapter_weights,
    arguments,
    load,
    packed_with_lora,
    sft_trainer,
    sums,
    tiny_tokenizer,
)

EPS = 2**-24
RANK = 5
SGD = {"optim": "sgd", "max_steps": 1, "weight_decay": 0.0, "learning_rate": 0.1}
STEPS = {"max_steps": 3, "weight_decay": 0.1, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """Folder of an instruct model of some families; its subspace file lies in it."""
    root = tmp_path_factory.mktemp("instruct")
    for family in ("gemma4", "gpt_oss", "llama"):
        it, pt = (save_tiny_model(family, root / f"{family}{seed}", seed=seed) for seed in (0, 1))
        importance.subspace(it, pt, root / family / "subspace", rank=RANK)
        it.rename(root / family / "it")
    return root


def protection(instruct, family="gemma4", **options):
    return Protection(subspace=instruct / family / "subspace", **options)


def trained(model, folder, settings=None, **changes):
    before = adapter_weights(model)
    trainer = sft_trainer(model, folder, protection=settings, **{**STEPS, **changes})
    trainer.train()
    return before, adapter_weights(trainer.model)


@pytest.fixture(scope="module")
def plain_sgd(instruct, tmp_path_factory):
    """Weights before and after one step of SGD without protection."""
    return trained(packed_with_lora(instruct / "gemma4" / "it"), tmp_path_factory.mktemp("plain"), **SGD)


def factors(weights):
    """Weight -> A and B of every expert, or of the one linear layer, indexed as PEFT documents them."""
    found = {}
    wrappers = {".experts.base_layer.": ".experts.gate_up_proj.", ".experts.lora": ".experts.down_proj.lora"}
    for name, value in weights.items():
        name = name.removeprefix("base_model.model.")
        for old, new in wrappers.items():
            name = name.replace(old, new)
        weight, _, factor = name.removesuffix(".default.weight").partition(".lora_")
        found.setdefault(weight if "experts" in weight else f"{weight}.weight", {})[factor] = value
    by_expert = {}
    for name, pair in found.items():
        a, b = pair["A"], pair["B"]
        experts = 7 if "experts" in name else 1
        rank = a.shape[0] // experts
        by_expert[name] = [
            (a[e * rank : (e + 1) * rank], torch.stack([b[:, j * experts + e] for j in range(rank)], 1))
            for e in range(experts)
        ]
    return by_expert


def bases(file, name):
    u, v = file[f"{name}.U"], file[f"{name}.V"]
    return list(zip(u, v, strict=True)) if u.ndim == 3 else [(u, v)]


def test_projected_updates_never_enter_the_subspace(instruct, tmp_path):
    model = packed_with_lora(instruct / "gemma4" / "it")
    before, after = trained(model, tmp_path, protection(instruct))
    file = load_file(instruct / "gemma4" / "subspace")
    start = factors(before)
    assert {"model.layers.0.experts.gate_up_proj", "model.layers.2.self_attn.o_proj.weight"} <= start.keys()
    assert len(start) == 3 * 2 + 11
    moved = 0
    for name, pairs in factors(after).items():
        for (u, v), (a, b), (a0, b0) in zip(bases(file, name), pairs, start[name], strict=True):
            assert b0.abs().sum() == 0
            moved += float((a - a0).norm()) + float(b.norm())
            # Each step rounds the weight once, and the product with a basis of n rows sums n rounded terms.
            bound = STEPS["max_steps"] * 2 * EPS * u.shape[0] ** 0.5
            assert float((u.T @ b).norm()) <= bound * float(b.norm()) + 1e-30, name
            assert float(((a - a0) @ v).norm()) <= STEPS["max_steps"] * 4 * EPS * v.shape[0] ** 0.5 * float(a.norm())
            assert float((u.T @ (b @ a)).norm()) <= bound * float(b.norm()) * float(a.norm()) + 1e-30
    assert moved > 1


def test_bad_step_that_only_the_device_knows_of_leaves_the_same_bits(instruct, tmp_path, monkeypatch):
    ends = []
    for late in (False, True):
        monkeypatch.setattr(readback, "reads_late", lambda device, late=late: late)
        model = packed_with_lora(instruct / "gemma4" / "it")
        trainer = sft_trainer(model, tmp_path, protection=protection(instruct), **STEPS)
        trainer.add_callback(Fault(model, "gradient", {1, 3}))
        trainer.train()
        assert trainer.skipped_steps == 2
        ends.append(adapter_weights(model))
    assert equal(*ends)


def test_rates_are_tried_outside_of_the_subspace_too(instruct, tmp_path):
    trainer = sft_trainer(
        packed_with_lora(instruct / "gemma4" / "it"), tmp_path, protection=protection(instruct), **STEPS
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    u = load_file(instruct / "gemma4" / "subspace")[f"{name}.U"]
    inside = []

    def divergence() -> float:
        _, b = factors(adapter_weights(trainer.model))[name][0]
        inside.append(float((u.T @ b).norm() / b.norm()))
        return 0.0

    range_test(trainer, divergence, [1e-3, 1e-2], steps=2, bound=1.0)
    # As above: two steps round the weight, and the product sums as many rounded terms as the basis has rows.
    assert len(inside) == 2
    assert max(inside) <= 2 * 2 * EPS * u.shape[0] ** 0.5


def test_damped_gradients_alone_let_adam_into_the_subspace(instruct, tmp_path):
    model = packed_with_lora(instruct / "gemma4" / "it")
    _, after = trained(model, tmp_path, protection(instruct, mode="scale_mask"))
    file = load_file(instruct / "gemma4" / "subspace")
    name = "model.layers.0.self_attn.q_proj.weight"
    (_, b), u = factors(after)[name][0], file[f"{name}.U"]
    assert float((u.T @ b).norm()) > 0.01 * float(b.norm())


@pytest.mark.parametrize("mode", ["scale_mask", "project"])
def test_gradient_loses_its_share_inside_the_subspace(instruct, plain_sgd, tmp_path, mode):
    start, free = plain_sgd
    settings = protection(instruct, mode=mode, strength=0.75)
    _, held = trained(packed_with_lora(instruct / "gemma4" / "it"), tmp_path, settings, **SGD)
    left = 0.25 if mode == "scale_mask" else 0.25**2  # the gradient alone, or the update after it too
    file = load_file(instruct / "gemma4" / "subspace")
    start, free, held = (factors(weights) for weights in (start, free, held))
    for name in free:
        for (u, v), (a0, b0), (a, b), (a1, b1) in zip(
            bases(file, name), start[name], free[name], held[name], strict=True
        ):
            for step, found, inside in (
                (b - b0, b1 - b0, u @ (u.T @ (b - b0))),
                (a - a0, a1 - a0, (a - a0) @ v @ v.T),
            ):
                error = found - (step - (1 - left) * inside)
                assert float(error.norm()) <= 1e-5 * float(step.norm()) + 4 * EPS * float(a.norm()), name


def test_no_strength_is_ordinary_training_bit_for_bit(instruct, tmp_path):
    _, plain = trained(packed_with_lora(instruct / "gemma4" / "it"), tmp_path)
    settings = protection(instruct, strength=0.0)
    _, found = trained(packed_with_lora(instruct / "gemma4" / "it"), tmp_path, settings)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_resumed_run_ends_with_identical_weights(instruct, tmp_path):
    options = {**STEPS, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    folder = instruct / "gemma4" / "it"
    _, whole = trained(packed_with_lora(folder), tmp_path, protection(instruct), **options)
    again = sft_trainer(packed_with_lora(folder), tmp_path / "again", protection=protection(instruct), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(adapter_weights(again.model)[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("family", "parts"),
    [("llama", ("q_proj", "down_proj")), ("gemma4", ("experts.", "q_proj")), ("gpt_oss", ("experts.",))],
)
def test_full_weights_never_move_inside_both_sides(instruct, family, parts, tmp_path):
    model = load(instruct / family / "it")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    before, after = trained(model, tmp_path, protection(instruct, family))
    file = load_file(instruct / family / "subspace")
    for name, weight in after.items():
        if name.endswith("bias"):
            assert not torch.equal(weight, before[name])  # no matrix, so free
            continue
        u, v = file[f"{name}.U"], file[f"{name}.V"]
        turned = family == "gpt_oss" and weight.ndim == 3
        delta, weight = ((t.mT if turned else t) for t in (weight - before[name], weight))
        bound = STEPS["max_steps"] * 4 * EPS * max(weight.shape[-2:]) * torch.linalg.matrix_norm(weight)
        assert bool((torch.linalg.matrix_norm(u.mT @ delta @ v) <= bound).all()), name
        assert float((u.mT @ delta).norm()) > 0.01 * float(delta.norm()) > 0


def test_rounded_weights_follow_their_master_copies(instruct, tmp_path):
    model = packed_with_lora(instruct / "gemma4" / "it", dtype="bfloat16")
    trainer = sft_trainer(model, tmp_path, protection=protection(instruct), **STEPS, optim="adamw_moeft_host")
    trainer.train()
    name = "model.layers.0.self_attn.q_proj"
    b = model.get_parameter(f"base_model.model.{name}.lora_B.default.weight")
    master = trainer.optimizer.state[b]["master"]
    u = load_file(instruct / "gemma4" / "subspace")[f"{name}.weight.U"]
    assert float((u.T @ master).norm()) <= STEPS["max_steps"] * 2 * EPS * u.shape[0] ** 0.5 * float(master.norm())
    assert torch.equal(b, master.bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_moeft_stochastic"}, "is torch.bfloat16 and optim 'adamw_moeft_stochastic' keeps no float32"),
        ({"optim": "adamw_moeft_host", "optim_args": "master_weights=false"}, "keeps no float32 master"),
        ({"optim": "lomo"}, "changes weights in backward"),
        ({"optim": "galore_adamw_layerwise"}, "changes weights in backward"),
    ],
)
def test_optimizers_whose_updates_cannot_be_held_are_refused(instruct, tmp_path, changes, message):
    model = packed_with_lora(instruct / "gemma4" / "it", dtype="bfloat16")
    with pytest.raises(ValueError, match=message):
        sft_trainer(model, tmp_path, protection=protection(instruct), **changes)
    free = protection(instruct, strength=0.0)
    assert sft_trainer(model, tmp_path, protection=free, **changes).protection is not None


@pytest.mark.parametrize("has_masters", [True, False])
def test_an_optimizer_that_is_given_is_asked_for_its_masters(instruct, tmp_path, has_masters):
    model = packed_with_lora(instruct / "gemma4" / "it", dtype="bfloat16")
    trained = [p for p in model.parameters() if p.requires_grad]
    given = HostAdamW(trained, master_weights=has_masters)
    with nullcontext() if has_masters else pytest.raises(ValueError, match="optim 'HostAdamW' keeps no float32 master"):
        moeft.SFTTrainer(
            model=model,
            args=moeft.SFTConfig(**arguments(tmp_path, optim="adamw_torch")),
            train_dataset=sums(),
            processing_class=tiny_tokenizer(),
            optimizers=(given, None),
            protection=protection(instruct),
        )


def test_gradients_of_rounded_weights_may_be_damped_without_masters(instruct, tmp_path):
    model = packed_with_lora(instruct / "gemma4" / "it", dtype="bfloat16")
    assert sft_trainer(model, tmp_path, protection=protection(instruct, mode="scale_mask")).protection is not None


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({"lora": {"dtype": "bfloat16"}}, True),
        ({"lora": {"dtype": "bfloat16"}, "training": {"optim": "adamw_moeft_8bit"}}, False),
        ({"train": ["attention"], "training": {"optim": "adamw_moeft_stochastic"}}, True),
        ({"train": ["attention"]}, False),
        ({"lora": {}}, False),
        ({"lora": {"dtype": "bfloat16"}, "protection": {"subspace": "s", "mode": "scale_mask"}}, False),
    ],
)
def test_a_recipe_whose_updates_would_be_rounded_is_refused_before_anything_is_loaded(tmp_path, changes, is_refused):
    content = {"model": "it", "output": "run", "data": {"train": "rows.jsonl"}, "protection": {"subspace": "s"}}
    recipe = SftRecipe.from_content(content | changes, "the recipe", tmp_path)
    with pytest.raises(RecipeError, match="rounding leads them back") if is_refused else nullcontext():
        preflight.check(recipe)


def test_layer_importance_decides_the_share_of_each_layer(instruct, tmp_path):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"format": "moeft-layer-importance-v1", "layers": {"0": 2.0, "1": 4.0, "2": 3.0}}))
    settings = protection(instruct, layer_importance=path, strength=0.5)
    trainer = sft_trainer(packed_with_lora(instruct / "gemma4" / "it"), tmp_path, protection=settings)
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "SubspaceProtection")
    assert {(t.layer, share) for t, share in callback._shares} == {(1, 0.5), (2, 0.25)}  # the least important is free


def test_plain_peft_adapters_are_protected_too(instruct, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model = get_peft_model(load(instruct / "gemma4" / "it"), config)
    _, after = trained(model, tmp_path, protection(instruct))
    file = load_file(instruct / "gemma4" / "subspace")
    for name, pairs in factors(after).items():
        for (u, _), (_, b) in zip(bases(file, name), pairs, strict=True):
            assert float((u.T @ b).norm()) <= STEPS["max_steps"] * 2 * EPS * u.shape[0] ** 0.5 * float(b.norm()) + 1e-30


def test_projector_does_not_round_to_tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    with whole_float32():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_projector_takes_each_expert_by_itself():
    generator = torch.Generator().manual_seed(0)
    m, left, right = (torch.randn(*shape, generator=generator) for shape in ((3, 8, 6), (3, 8, 2), (3, 6, 4)))
    left, right = (torch.linalg.qr(basis).Q for basis in (left, right))
    for rows, columns in ((left, None), (None, right), (left, right)):
        projector, found = Projector(rows, columns), m.clone()
        projector.subtract_(found, projector.coordinates(m), 0.5)
        for e in range(3):
            inside = m[e] if rows is None else rows[e] @ rows[e].T @ m[e]
            inside = inside if columns is None else inside @ columns[e] @ columns[e].T
            torch.testing.assert_close(found[e], m[e] - 0.5 * inside)


def rewritten(instruct, folder, change, metadata=None):
    """The gemma4 file with other content."""
    with safe_open(instruct / "gemma4" / "subspace", "pt") as file:
        old = file.metadata()
    tensors = load_file(instruct / "gemma4" / "subspace")
    change(tensors)
    save_file(tensors, folder / "changed", {**old, **(metadata or {})})
    return Protection(subspace=folder / "changed")


NAME = "model.layers.1.experts.gate_up_proj"


def cut(tensors, *part):
    tensors[f"{NAME}.U"] = tensors[f"{NAME}.U"][part].clone()


@pytest.mark.parametrize(
    ("change", "metadata", "expected"),
    [
        (lambda t: t.pop(f"{NAME}.V"), {}, rf"lacks {NAME}.V, and {NAME} is trained"),
        (lambda t: cut(t, slice(None), slice(1, None)), {}, r"is .*but .*\[7, 95, 64\].*this model"),
        (lambda t: cut(t, slice(1, None)), {}, r"is .*but .*\[6, 96, 64\] in"),
        (lambda t: None, {"base_fingerprint": "sampled-v1:0"}, "with fingerprint sampled-v1:0, but the model to train"),
        (lambda t: None, {"format": "other"}, "has format 'other', expected 'moeft-subspace-v1'"),
    ],
)
def test_file_of_another_model_is_refused(instruct, tmp_path, change, metadata, expected):
    with pytest.raises(CheckpointError, match=expected):
        sft_trainer(
            packed_with_lora(instruct / "gemma4" / "it"),
            tmp_path,
            protection=rewritten(instruct, tmp_path, change, metadata),
        )


def test_ranks_that_cannot_be_used_are_refused(instruct, tmp_path):
    model = packed_with_lora(instruct / "gemma4" / "it")
    with pytest.raises(ValueError, match=r"rank is 6, but .* holds 5 directions"):
        sft_trainer(model, tmp_path, protection=protection(instruct, rank=6))
    it, pt = instruct / "gemma4" / "it", instruct / "gemma41"
    importance.subspace(it, pt, tmp_path / "all", rank=32, targets=["attention"])
    model = moeft.add_lora(load(it), 2, targets=("attention",))
    with pytest.raises(ValueError, match=r"rank is 32, all there is of .*lora_B.* nothing would be left"):
        sft_trainer(model, tmp_path, protection=Protection(subspace=tmp_path / "all"))


def test_trained_matrix_outside_of_the_layers_is_refused(instruct, tmp_path):
    model = load(instruct / "llama" / "it").requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is trained and in no decoder layer"):
        sft_trainer(model, tmp_path, protection=protection(instruct, "llama"))


def test_layer_importance_that_cannot_be_used_is_refused(instruct, tmp_path):
    model = packed_with_lora(instruct / "gemma4" / "it")
    path = tmp_path / "layers.json"
    for content, expected in (
        ("{", "holds no layer importance"),
        ('{"format": "other", "layers": {}}', "format is 'other'"),
        ('{"format": "moeft-layer-importance-v1", "layers": {}}', "holds no layer importance"),
        ('{"format": "moeft-layer-importance-v1", "layers": {"0": 1.0}}', "lacks layer 1, which is trained"),
        ('{"format": "moeft-layer-importance-v1", "layers": {"0": 1.0, "1": NaN, "2": 2}}', "layer 1 has nan"),
    ):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=expected):
            sft_trainer(model, tmp_path, protection=protection(instruct, layer_importance=path))
    with pytest.raises(CheckpointError, match="make it with `moeft subspace`"):
        sft_trainer(model, tmp_path, protection=Protection(subspace=Path(tmp_path / "absent")))


@pytest.mark.parametrize("family", ["gemma4", "llama"])
def test_a_plan_counts_the_bases_that_training_holds(instruct, family):
    events = []
    targets = ("attention", "experts") if family == "gemma4" else ("attention", "mlp")
    path = instruct / family / "it"
    model = moeft.add_lora(load(path), 4, targets=targets)
    settings = protection(instruct, family)
    callback = SubspaceProtection(model, settings, SimpleNamespace(event=lambda kind, **fields: events.append(fields)))
    callback.on_train_begin(None, None, None)
    planned = Settings(quantization=None, lora=Lora(rank=4, targets=targets), dtype="float32", protected_rank=RANK)
    assert plan(path, recipe=planned).bytes_of("instruct subspace") == events[0]["bytes"] > 0


def test_a_plan_counts_the_bases_of_weights_that_train_in_full(instruct, tmp_path):
    path = instruct / "gemma4" / "it"
    model = load(path)
    train_roles(model, ("attention", "norms"))
    callback = SubspaceProtection(model, protection(instruct))
    with callback.at_hand():
        held = sum(protected.projector.nbytes for protected in callback._protected)
    content = {"model": str(path), "output": "run", "data": {"train": "rows.jsonl"}, "train": ["attention", "norms"]}
    content["protection"] = {"subspace": str(instruct / "gemma4" / "subspace")}
    recipe = SftRecipe.from_content(content, "the recipe", tmp_path)
    assert plan(path, recipe=recipe).bytes_of("instruct subspace") == held > 0


def test_a_model_made_from_the_instruct_model_trains_if_the_recipe_says_so(instruct, tmp_path):
    moved = save_tiny_model("gemma4", tmp_path / "moved", seed=5)
    with pytest.raises(CheckpointError, match=r"set protection\.derived"):
        sft_trainer(packed_with_lora(moved), tmp_path / "refused", protection=protection(instruct))
    sft_trainer(packed_with_lora(moved), tmp_path / "taken", protection=protection(instruct, derived=True))
