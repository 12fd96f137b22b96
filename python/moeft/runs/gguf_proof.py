"""Proves GGUF files: names and layout, blocks, tokenizer and quality, beside transformers and ggml."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft import gguf, serving
from moeft.errors import CheckpointError

if TYPE_CHECKING:
    from moeft.evaluation.llama_cpp import Comparison
    from moeft.gguf.block_check import BlockCheck

# Largest error over the spread of the log-probabilities: f32 sums differ in their order alone, and f16 rounds weights.
LAYOUT_ERROR = {"f32": 1e-3, "f16": 1e-2}
# A router near a tie chooses other experts for a token now and then; what is laid out wrongly is wrong everywhere.
LAYOUT_SHARE = 0.9


@dataclass(frozen=True)
class FileProof:
    """One file: bits of a weight, blocks beside ggml's, and the model that it holds beside transformers."""

    name: str
    bits_per_weight: float
    blocks: BlockCheck | None
    comparison: Comparison


@dataclass
class GgufProof:
    """What was proven of the files of a model. ``str()`` is a table.

    Attributes:
        layout_type: Type of the file with all weights whose log-probabilities were compared.
        reference_perplexity: Of transformers in float32.
        tokens: Number of tokens.
        texts: Number of texts that both tokenizers cut.
        cut_differently: Those of them that llama.cpp cuts differently.
        files: The file of ``layout_type``, then those that were asked for.
    """

    layout_type: str
    reference_perplexity: float
    tokens: int
    texts: int
    cut_differently: tuple[str, ...]
    files: list[FileProof] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What does not hold."""
        found = [f"llama.cpp cuts {text!r} into other tokens" for text in self.cut_differently]
        error, bound = self.files[0].comparison.error(LAYOUT_SHARE), LAYOUT_ERROR[self.layout_type]
        if not error <= bound:
            found.append(
                f"the {self.layout_type} file computes something else: {error:.2g}, at most {bound:.0e} expected"
            )
        for proof in self.files:
            different = proof.blocks.different if proof.blocks else ()
            found += [f"{proof.name}: {name} has other blocks than ggml makes" for name in different]
        return found

    def __str__(self) -> str:
        lines = [
            f"{'file':<24}{'bits':>6}{'blocks as ggml':>16}{'error':>10}{'divergence':>12}{'same top':>10}"
            f"{'greedy':>8}{'perplexity':>12}"
        ]
        for proof in self.files:
            found, blocks = proof.comparison, proof.blocks
            same = "-" if blocks is None else f"{blocks.tensors - len(blocks.different)} of {blocks.tensors}"
            lines.append(
                f"{proof.name:<24}{proof.bits_per_weight:>6.2f}{same:>16}{found.error():>10.1e}{found.divergence:>12.1e}"
                f"{found.same_top:>10.0%}{found.greedy:>8.0%}{found.perplexity:>12.3f}"
            )
        lines.append(f"{'transformers, float32':<94}{self.reference_perplexity:>4.3f}")
        lines.append(f"{self.tokens} tokens; {self.texts - len(self.cut_differently)} of {self.texts} texts cut alike")
        return "\n".join([*lines, *(f"FAILED {problem}" for problem in self.problems())])


def prove(
    model: Path,
    files: Sequence[Path],
    *,
    text: Path | None = None,
    layout_type: str = "f32",
    max_tokens: int = 64,
    imatrix: Path | None = None,
    threads: int | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> GgufProof:
    """Compare files with the checkpoint that they were made from.

    A file with all weights, ``layout_type``, is written beside the first and removed at the end.

    Args:
        model: Folder of the checkpoint, which is loaded in float32.
        files: GGUF files; of a split model the first.
        text: Plain text whose paragraphs are the sequences; default one that comes with moeft.
        layout_type: ``f32``, or ``f16`` for half the space and a tenth of the precision.
        max_tokens: Most tokens of a paragraph.
        imatrix: Importance matrix that the files were made with.
        threads: Threads of llama.cpp.
        show: Where to say what is being done.

    Raises:
        MoeftError: If the checkpoint or a file cannot be used; see the classes.
        ValueError: If there is no text to compare.
    """
    from moeft.evaluation.ggml_reference import reference
    from moeft.integration.loading import load

    if layout_type not in LAYOUT_ERROR:
        raise ValueError(f"layout_type is {layout_type!r}, expected f32 or f16")
    show("transformers in float32")
    loaded, tokenizer = load(model, dtype="float32")
    if tokenizer is None:
        raise CheckpointError(f"{model} holds no tokenizer; copy that of the base beside the weights")
    texts = _paragraphs(text)
    sequences = [ids for paragraph in texts if len(ids := tokenizer(paragraph)["input_ids"][:max_tokens]) > 3]
    if not sequences:
        raise ValueError(f"{text} holds no paragraph of more than 3 tokens; give a longer text")
    spoken = reference(loaded, sequences)
    proof = GgufProof(layout_type, spoken.perplexity(), sum(map(len, sequences)), len(texts), ())
    del loaded
    folder = files[0].resolve().parent if files else None
    with tempfile.TemporaryDirectory(prefix=".gguf-proof-", dir=folder) as scratch:
        exact = Path(scratch) / f"all-{layout_type}.gguf"
        report = gguf.export(model, exact, type=layout_type, threads=threads)  # type: ignore[arg-type]  # checked above
        show(f"llama.cpp on {layout_type}")
        options = serving.ServeOptions(context=2 * max_tokens + 8, threads=threads, exact=True)
        with serving.Server(exact, options) as server:
            proof.cut_differently = _cut_differently(server.client, tokenizer, texts)
            comparison = _compare(server.client, spoken)
        proof.files.append(FileProof(f"all in {layout_type}", report.bits_per_weight, None, comparison))
        for file in files:
            show(f"llama.cpp on {file.name}")
            proof.files.append(_file(file, exact if layout_type == "f32" else None, options, spoken, imatrix))
    return proof


def _file(
    file: Path, exact: Path | None, options: serving.ServeOptions, spoken: Any, imatrix: Path | None
) -> FileProof:
    from moeft.gguf.block_check import check_blocks

    headers = {part: gguf.read_header(part)["tensors"] for part in gguf.parts(file)}
    tensors = [tensor for of_part in headers.values() for tensor in of_part]
    values = sum(_elements(tensor["shape"]) for tensor in tensors)
    blocks = None
    if exact is not None:
        importance = None if imatrix is None else gguf.read_imatrix(imatrix).means()
        blocks = check_blocks(headers, (exact, gguf.read_header(exact)["tensors"]), importance)
    with serving.Server(file, options) as server:
        comparison = _compare(server.client, spoken)
    return FileProof(file.name, sum(t["bytes"] for t in tensors) * 8 / values, blocks, comparison)


def _compare(client: serving.Client, spoken: Any) -> Comparison:
    from moeft.evaluation.llama_cpp import compare

    return compare(client, spoken)


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _paragraphs(text: Path | None) -> list[str]:
    default = resources.files("moeft.runs") / "gguf_proof.txt"
    whole = (default if text is None else text).read_text("utf-8")
    return [paragraph for paragraph in (part.strip() for part in whole.split("\n\n")) if paragraph]


def _cut_differently(client: serving.Client, tokenizer: Any, texts: Sequence[str]) -> tuple[str, ...]:
    def same(text: str) -> bool:
        return bool(client.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"])

    return tuple(text for text in texts if not same(text))
