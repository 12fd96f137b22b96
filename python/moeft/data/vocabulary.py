"""Whether a tokenizer and a model belong together."""

from typing import TYPE_CHECKING, Any

from moeft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from moeft.data.example import Examples


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", num_embeddings: int) -> None:
    """Refuse a tokenizer with ids that a model has no embedding for.

    Added tokens that rows need not hold are let pass: Gemma 3's text models lack the embedding of one for images. If a
    row does hold one, :func:`check_ids` says so.

    Args:
        tokenizer: The tokenizer.
        num_embeddings: Rows of the model's embedding.

    Raises:
        DataError: If an ordinary token, or one that starts, ends or pads rows, has no embedding.
    """
    base: Any = tokenizer
    added = set(base.added_tokens_encoder)
    beyond = sorted(
        (index, token) for token, index in base.get_vocab().items() if index >= num_embeddings and token not in added
    )
    for role in ("bos", "eos", "pad"):
        index = getattr(base, f"{role}_token_id")
        if index is not None and index >= num_embeddings:
            beyond.append((index, getattr(base, f"{role}_token")))
    if beyond:
        index, token = beyond[0]
        raise DataError(
            f"the model has {num_embeddings} embeddings, and {len(beyond)} tokens of the tokenizer have none, such as "
            f"{token!r} with id {index}; is this the model's own tokenizer?"
        )


def check_ids(examples: "Examples", num_embeddings: int) -> None:
    """Refuse rows with ids that a model has no embedding for.

    Raises:
        DataError: Naming the highest id.
    """
    highest = int(examples.input_ids.max(initial=0))
    if highest >= num_embeddings:
        raise DataError(
            f"the rows hold the token id {highest}, and the model has embeddings for {num_embeddings} tokens; "
            "was a token added to the tokenizer, or are the rows those of another one?"
        )
