"""``moeft imatrix``: rows, model, what goes into its weights, llama.cpp's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moeft import gguf
from moeft.errors import CheckpointError
from moeft.progress_bar import step_bar
from moeft.runs.measured import draw, encode, load


def run(
    model: Path,
    data: Path,
    out: Path,
    *,
    rows: int = 200,
    max_length: int = 512,
    dtype: str = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    show: Callable[[str], None] = print,
) -> gguf.ImportanceMatrix:
    """Measure the importance matrix of a model on some rows and write it.

    Args:
        model: Checkpoint, 16-bit or packed.
        data: Rows in any format that moeft reads.
        out: File to write, which appears when it is complete.
        rows: Rows to measure, drawn at random.
        max_length: Longer rows are cut to this many tokens.
        dtype: Of the weights that are not in 4 bits.
        device: Where to compute.
        seed: Of the choice of rows.
        show: Where to print what is found.

    Raises:
        MoeftError: If model or rows cannot be used; see the classes.
    """
    from moeft.importance import squared_inputs
    from moeft.integration import model_family

    if out.exists():
        raise CheckpointError(f"{out} exists; choose another name or remove it")
    loaded, tokenizer = load(model, dtype, device, show)
    names = gguf.weight_names(model_family.of_model(loaded), (path for path, _ in loaded.named_modules()))
    encoded = encode(data, tokenizer, "all", max_length)
    chosen = draw(encoded.examples, rows, seed)
    show(f"{encoded}; {len(chosen)} of them are measured")
    with step_bar("imatrix", True) as progress:
        found = squared_inputs(
            loaded,
            list(names.linears),
            list(names.experts),
            (row["input_ids"] for row in chosen),
            None if progress is None else lambda done, _, what: progress(done, len(chosen), what),
        )
    tensors = {weight: of_weight for weight, of_weight in names.tensors().items() if weight in found.sums}
    matrix = gguf.ImportanceMatrix(
        {name: found.sums[weight].float().numpy() for weight, of_weight in tensors.items() for name in of_weight},
        {name: found.counts[weight].float().numpy() for weight, of_weight in tensors.items() for name in of_weight},
        [data.name],
        found.sequences,
        found.longest,
    )
    gguf.write_imatrix(matrix, out)
    show(f"{len(matrix.sums)} tensors measured on {sum(len(row['input_ids']) for row in chosen):,} tokens: {out}")
    unreached = matrix.unreached()
    if unreached:
        experts = max(unreached.values())
        show(
            f"{len(unreached)} of them have experts that no token reached, up to {experts}; these are quantised as "
            "without a matrix, so more rows are better"
        )
    return matrix
