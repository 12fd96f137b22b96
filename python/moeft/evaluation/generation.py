"""Batched greedy replies of a causal language model to chat prompts."""

import itertools
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
    tools: Sequence[Mapping[str, Any]] | None = None,
    skip_special_tokens: bool = True,
) -> list[str]:
    """Generate one reply per prompt, greedily.

    The model's training mode and the tokenizer's padding side are put back afterwards, also after an error.

    Args:
        model: Any causal language model with ``generate``, a ``PeftModel`` included.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Requests, or lists of messages.
        max_new_tokens: Most tokens of a reply.
        batch_size: Prompts per batch, padded on the left.
        tools: Schemas of tools on offer, for the chat template.
        skip_special_tokens: Leave special tokens out; calls of some protocols are made of them.

    Returns:
        Replies in the order of ``prompts``, without special tokens and otherwise unchanged; with them, up to the end
        of the turn.

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
    texts = [_render(tokenizer, prompt, tools) for prompt in prompts]
    replies = [""] * len(texts)
    # Prompts of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with evaluating(model), _padding_left(tokenizer), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index, reply in zip(
                batch,
                _generate(model, tokenizer, [texts[index] for index in batch], max_new_tokens, skip_special_tokens),
                strict=True,
            ):
                replies[index] = reply
    return replies


def _render(tokenizer: Any, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    schemas = None if tools is None else list(tools)
    return tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False, add_generation_prompt=True)


def _generate(
    model: Any, tokenizer: Any, texts: list[str], max_new_tokens: int, skip_special_tokens: bool
) -> list[str]:
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
    new_BS = output_BS[:, inputs["input_ids"].shape[1] :]
    if skip_special_tokens:
        return tokenizer.batch_decode(new_BS, skip_special_tokens=True)
    ends = {tokenizer.pad_token_id, *_ends(model)}
    kept = [[*itertools.takewhile(lambda token: token not in ends, row)] for row in new_BS.tolist()]
    return tokenizer.batch_decode(kept, skip_special_tokens=False)


def _ends(model: Any) -> list[int]:
    """Tokens at which generation stops."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


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
