"""Batched replies of a causal language model to chat prompts."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moeft.errors import DataError
from moeft.evaluation.turn_scores import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Prompt = str | Sequence[Mapping[str, Any]]
"""A user's request, or the messages that come before the reply."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the most probable token each time."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together have this probability."""
    seed: int = 0
    """Of the drawing; the replies of a batch also depend on what else is in it."""


def generate_replies(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    tools: Sequence[Mapping[str, Any]] = (),
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
    found = iterate_replies(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        tools=[tools] * len(prompts),
        skip_special_tokens=skip_special_tokens,
    )
    replies = dict(found)
    return [replies[index] for index in range(len(prompts))]


def iterate_replies(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    sampling: Sampling | None = None,
    tools: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    skip_special_tokens: bool = True,
) -> Iterator[tuple[int, str]]:
    """As :func:`generate_replies`, batch by batch: yield the index of a prompt and its reply.

    Args:
        model: As there.
        tokenizer: As there.
        prompts: As there.
        max_new_tokens: As there.
        batch_size: As there.
        sampling: How tokens are chosen; None takes the most probable ones. torch's own random state is left alone.
        tools: Schemas of tools on offer for each prompt.
        skip_special_tokens: As there.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}, expected at least 1")
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; set tokenizer.chat_template, or use an instruct model's")
    if tokenizer.pad_token_id is None and tokenizer.eos_token is None:
        raise DataError("the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token")
    offered = [()] * len(prompts) if tools is None else tools
    texts = [render(tokenizer, prompt, shown) for prompt, shown in zip(prompts, offered, strict=True)]
    # Prompts of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with evaluating(model), _padding_left(tokenizer), torch.inference_mode():
            tokens = _generate(model, tokenizer, [texts[i] for i in batch], max_new_tokens, sampling or Sampling())
            replies = _decode(model, tokenizer, tokens, skip_special_tokens)
        yield from zip(batch, replies, strict=True)


def render(tokenizer: Any, prompt: Prompt, tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """A prompt in the words of the tokenizer's chat template, up to where the reply begins."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    shown = {"tools": list(tools)} if tools else {}
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **shown)


def _generate(model: Any, tokenizer: Any, texts: list[str], max_new_tokens: int, sampling: Sampling) -> torch.Tensor:
    device = next(model.parameters()).device
    # The template writes its own special tokens.
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        output_BS = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **drawn,
        )
    return output_BS[:, inputs["input_ids"].shape[1] :]


def _decode(model: Any, tokenizer: Any, new_BS: torch.Tensor, skip_special_tokens: bool) -> list[str]:
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
