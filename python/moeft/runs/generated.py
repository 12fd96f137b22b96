"""Replies of a checkpoint, with adapters or without, to requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft.hard.requests import Request
from moeft.runs.hard import Toolbox
from moeft.runs.measured import available_device, load


@dataclass(frozen=True)
class Speaker:
    """A model that is asked.

    Attributes:
        model: Folder of a checkpoint, 16-bit or packed.
        adapters: Folders of adapters, lowest first.
        dtype: Of the weights that are not in 4 bit.
        chat_template: Name or path; None takes the tokenizer's.
        max_new_tokens: Longest reply.
        batch_size: Requests at a time.
        device: Where to compute; None takes a GPU if there is one.
    """

    model: Path
    adapters: tuple[Path, ...] = ()
    dtype: str = "bfloat16"
    chat_template: str | Path | None = None
    max_new_tokens: int = 128
    batch_size: int = 16
    device: str | None = None

    def load(self, show: Callable[[str], None] = print) -> tuple[Any, Any]:
        """Model and tokenizer.

        Raises:
            MoeftError: If one of them cannot be used.
        """
        from moeft.integration.lora import load_adapter

        device = self.device or available_device()
        speaking, tokenizer = load(self.model, self.dtype, device, show, self.chat_template)
        for index, path in enumerate(self.adapters):
            speaking = load_adapter(speaking, path, name=f"adapter_{index}")
        return speaking, tokenizer

    def replies(self, model: Any, tokenizer: Any, requests: Sequence[Request], tools: Toolbox) -> list[str]:
        """Greedy replies, with the schemas for templates that show tools."""
        from moeft.evaluation.generation import generate_replies

        return generate_replies(
            model,
            tokenizer,
            [request.prompt for request in requests],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            tools=tools.schemas.tools,
            # Gemma's calls are made of special tokens.
            skip_special_tokens=tools.protocol.name != "gemma",
        )
