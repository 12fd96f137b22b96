"""What the tests of training share: a tokenizer that fits the tiny models, rows, adapters and trainers over them."""

from __future__ import annotations

import hashlib
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models

import moeft
from moeft.modules import PackedModule
from tests.tiny_models import VOCABULARY

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1 and 2 as in tiny_models
TARGETS = ("attention", "experts")


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per printable ASCII character, and a ChatML template."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, "\n", *string.printable[:95]])}
    assert len(vocabulary) <= VOCABULARY
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.add_special_tokens(SPECIAL)
    backend.decoder = decoders.Fuse()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **tokens)


def sums(count: int = 24, offset: int = 0) -> list[dict[str, str]]:
    """Rows that a tiny model can learn something from."""
    pairs = [((7 * i + offset) % 10, (3 * i + 2) % 10) for i in range(count)]
    return [{"prompt": f"{a} + {b}?", "completion": f"{a + b}" + "!" * (i % 4)} for i, (a, b) in enumerate(pairs)]


def load(folder: Path, **options: Any) -> transformers.PreTrainedModel:
    """A checkpoint as float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def packed_with_lora(folder: Path, rank: int = 4, **options: Any) -> Any:
    """A packed model with a fresh adapter on attention and experts."""
    packed = load(folder, quantization_config=moeft.NF4Config())
    return moeft.add_lora(packed, rank, targets=TARGETS, seed=0, **options)


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Training arguments for a few deterministic steps on the CPU, logged one by one."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return defaults | changes


def sft_trainer(
    model: Any,
    folder: Path,
    rows: Any = None,
    eval_dataset: Any = None,
    events: Any = None,
    protection: Any = None,
    **changes: Any,
) -> moeft.SFTTrainer:
    """An SFTTrainer with these arguments."""
    return moeft.SFTTrainer(
        model=model,
        args=moeft.SFTConfig(**arguments(folder, **changes)),
        train_dataset=sums() if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        events=events,
        protection=protection,
    )


def losses(trainer: transformers.Trainer) -> list[float]:
    """Logged training losses, step by step."""
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen_hash(model: torch.nn.Module) -> str:
    """SHA-256 over all that training must not touch: frozen parameters and all buffers, packed bytes included."""
    digest = hashlib.sha256()
    assert any(isinstance(module, PackedModule) for module in model.modules())
    tensors = [(n, p) for n, p in model.named_parameters() if not p.requires_grad] + list(model.named_buffers())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
