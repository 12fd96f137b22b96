"""Held-out requests with the right tool call: scores of a model's replies, and samples of them for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeft.config.evaluation import Evaluation
from moeft.data.reading import read_rows
from moeft.errors import DataError

SAMPLES = 4


class HeldOutCalls:
    """The rows of ``evaluation.tool_calls``; the last message of each is the reference.

    Args:
        path: File of chat rows.
        settings: How to generate.

    Raises:
        DataError: If a row does not end with a request and its reply.
    """

    def __init__(self, path: Path, settings: Evaluation) -> None:
        rows = read_rows(path, turns="any").rows
        for row in rows:
            if [message["role"] for message in row.messages[-2:]] != ["user", "assistant"]:
                raise DataError(f"{path} line {row.line}: a held-out call needs a user's turn and the reply to it")
        self.settings = settings
        self.prompts: list[Any] = [row.messages[:-1] for row in rows]
        self.references = [row.messages[-1]["content"] for row in rows]

    def score(self, model: Any, tokenizer: Any) -> tuple[dict[str, Any], list[str]]:
        """Shares of exact and valid replies, and the replies to the first few requests."""
        from moeft.evaluation.tool_score import score_tool_calls

        replies = self.replies(model, tokenizer)
        score = score_tool_calls(replies, self.references)
        figures = {"exact_match": score.exact_share, "valid": score.valid_share, "rows": len(replies)}
        return figures, replies[:SAMPLES]

    def replies(self, model: Any, tokenizer: Any) -> list[str]:
        """A reply to every request."""
        return self._generate(model, tokenizer, self.prompts)

    def samples(self) -> list[dict[str, str]]:
        """The first few requests with their references."""
        pairs = zip(self.prompts, self.references[:SAMPLES], strict=False)
        return [{"prompt": prompt[-1]["content"], "reference": reference} for prompt, reference in pairs]

    def sample_replies(self, checkpoint: Path, dtype: str, tokenizer: Any) -> list[str]:
        """Replies of an ordinary checkpoint, by plain transformers, to the first few requests.

        The tokenizer is that of training, whose chat template need not lie in the checkpoint.
        """
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        return self._generate(model, tokenizer, self.prompts[:SAMPLES])

    def _generate(self, model: Any, tokenizer: Any, prompts: list[Any]) -> list[str]:
        from moeft.evaluation.generation import generate_replies

        sizes: dict[str, Any] = {"max_new_tokens": self.settings.max_new_tokens, "batch_size": self.settings.batch_size}
        return generate_replies(model, tokenizer, prompts, **sizes)
