"""Batched greedy replies of a causal language model to chat prompts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from moeft.errors import DataError
from moeft.evaluation.turn_scores import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Prompt = str | Sequence[Mapping[str, Any]]
"""A user's request, or the messages that come before the reply."""


def generate_replies(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """Generate one reply per prompt, greedily.

    The model's training mode and the tokenizer's padding side are put back afterwards, also after an error.

    Args:
        model: Any causal language model with ``generate``, a ``PeftModel`` included.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Requests, or lists of messages.
        max_new_tokens: Most tokens of a reply.
        batch_size: Prompts per batch, padded on the left.

    Returns:
        Replies in the order of ``prompts``, without special tokens and otherwise unchanged.

    Raises:
        DataError: If the tokenizer has no chat template or no padding token.
        ValueError: If a size is below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}, expected at least 1")
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; set tokenizer.chat_template, or use an instruct model's")
    if tokenizer.pad_token_id is None and tokenizer.eos_token is None:
        raise DataError("the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token")
    texts = [_render(tokenizer, prompt) for prompt in prompts]
    replies = [""] * len(texts)
    # Prompts of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with evaluating(model), _padding_left(tokenizer), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index, reply in zip(
                batch, _generate(model, tokenizer, [texts[index] for index in batch], max_new_tokens), strict=True
            ):
                replies[index] = reply
    return replies


def _render(tokenizer: Any, prompt: Prompt) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _generate(model: Any, tokenizer: Any, texts: list[str], max_new_tokens: int) -> list[str]:
    device = next(model.parameters()).device
    # The template writes its own special tokens.
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
    output_BS = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return tokenizer.batch_decode(output_BS[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def _padding_left(tokenizer: Any) -> Iterator[None]:
    side, token = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if token is None:  # masked, so any will do
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = side
        tokenizer.pad_token = token
