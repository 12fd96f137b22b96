"""A GGUF file in llama.cpp beside its checkpoint in transformers, on the same tokens.

Shapes: T tokens of a sequence, V vocabulary, N tokens of a sequence after its first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeft.errors import ServingError
from moeft.evaluation.ggml_reference import GREEDY_TOKENS, Reference
from moeft.serving import Client

LIKELIEST = 256
# So much that the wanted token is taken; the log-probabilities are those from before.
FORCED = 1e9
# What the server is made to write where the wanted token is no whole character.
WHOLE = "a"


@dataclass(frozen=True)
class Comparison:
    """How far llama.cpp is from transformers.

    Attributes:
        errors: Root mean square difference of the log-probabilities of the likeliest tokens, of each position.
        spread: Standard deviation of all log-probabilities, with which errors are to be compared.
        divergence: Mean Kullback-Leibler divergence over the likeliest tokens, in nats.
        same_top: Share of positions with the same most likely token.
        perplexity: llama.cpp's, of the sequences.
        greedy: Share of sequences that go on with the same tokens.
    """

    errors: tuple[float, ...]
    spread: float
    divergence: float
    same_top: float
    perplexity: float
    greedy: float

    def error(self, share: float = 0.5) -> float:
        """The error over the spread that this share of the positions stays below; the median by default."""
        return float(torch.tensor(self.errors, dtype=torch.float64).quantile(share)) / self.spread


def compare(client: Client, reference: Reference) -> Comparison:
    """Ask a server for the next token at every position.

    Args:
        client: Of a server with exact caches.
        reference: What transformers says.

    Raises:
        ServingError: If the server does not answer.
    """
    errors, divergences, same, losses, greedy = [], [], [], [], []
    for ids, ours_TV, ours_greedy in zip(reference.sequences, reference.log_probs, reference.greedy, strict=True):
        for position in range(1, len(ids)):
            chosen, likeliest = _next_token(client, ids[:position], ids[position], ours_TV.shape[1])
            tokens = torch.tensor(list(likeliest))
            theirs = torch.tensor(list(likeliest.values()), dtype=torch.float64)
            ours = ours_TV[position - 1, tokens].double()
            errors.append(float((theirs - ours).square().mean().sqrt()))
            divergences.append(float((ours.exp() * (ours - theirs)).sum()))
            same.append(max(likeliest, key=likeliest.__getitem__) == int(ours_TV[position - 1].argmax()))
            losses.append(-chosen)
        half = ids[: len(ids) // 2]
        written = client.complete(half, n_predict=GREEDY_TOKENS, temperature=0, return_tokens=True, ignore_eos=True)
        greedy.append(written["tokens"] == ours_greedy)
    return Comparison(
        tuple(errors),
        reference.spread,
        _mean(divergences),
        _mean(same),
        float(torch.tensor(losses, dtype=torch.float64).mean().exp()),
        _mean(greedy),
    )


def _next_token(client: Client, ids: list[int], following: int, vocabulary: int) -> tuple[float, dict[int, float]]:
    """Log-probability of a token, and of the likeliest ones."""
    count = min(LIKELIEST, vocabulary - 1)
    found = _forced(client, ids, following, count)
    if found is not None:
        return found
    # The token is a part of a character, of which llama.cpp reports nothing: it is looked up beside a whole one.
    found = _forced(client, ids, client.tokenize(WHOLE)[-1], vocabulary)
    if found is None or following not in found[1]:
        raise ServingError(f"llama.cpp reports no probability of token {following}, which is a part of a character")
    likeliest = sorted(found[1].items(), key=lambda entry: -entry[1])[:count]
    return found[1][following], dict(likeliest)


def _forced(client: Client, ids: list[int], following: int, count: int) -> tuple[float, dict[int, float]] | None:
    """What the server says where it is made to write a token; None if it says nothing."""
    answer = client.complete(
        ids, n_predict=1, n_probs=count, temperature=0, logit_bias=[[following, FORCED]], cache_prompt=True
    )
    if "completion_probabilities" not in answer:
        return None
    (token,) = answer["completion_probabilities"]
    assert token["id"] == following
    return token["logprob"], {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}


def _mean(values: list[float] | list[bool]) -> float:
    return sum(values) / len(values)
