"""Fine-tuning with transformers, PEFT and bitsandbytes alone: what ``moeft sft`` is compared with.

The rows come as token ids and labels, so that every difference is one of training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Rows = list[dict[str, list[int]]]


def train(
    model: Path, tokenizer: Any, rows: Rows, heldout: Rows, rank: int, alpha: float, init_seed: int, rounded: bool,
    **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Losses of every step and of the held-out rows, and the share of weights that train.

    Args:
        model: 16-bit checkpoint; its weights are computed with in float32.
        tokenizer: Its tokenizer, for padding.
        rows: ``input_ids`` and ``labels`` to train on.
        heldout: The same to measure on.
        rank: Of LoRA on all seven projections.
        alpha: Of LoRA.
        init_seed: Of the first weights of LoRA.
        rounded: Give every linear layer of the decoder the values that bitsandbytes restores from NF4.
        **arguments: Of ``TrainingArguments``.
    """
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if rounded:
        for layer in base.model.layers.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = through_nf4(layer.weight.data)
    torch.manual_seed(init_seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    trainable, total = adapted.get_nb_trainable_parameters()
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(remove_unused_columns=False, report_to="none", **arguments),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    before = heldout_loss(adapted, heldout)
    trainer.train()
    return {
        "trainable_parameters": trainable,
        "parameters": total,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "heldout": {"before": before, "after": heldout_loss(adapted, heldout)},
    }


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes restores from a weight's 4-bit codes."""
    return dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))


def heldout_loss(model: nn.Module, rows: Rows) -> float:
    """Mean negative log-likelihood of all labels, in nats."""
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"])[1:]
            total += float(nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / max(count, 1)
