"""Write ``gguf_blocks.json``: rows of float32 and the blocks that ggml makes of them.

Needs ``pip install xllamacpp numpy``, whose extension exports ggml's C functions::

    python tests/vectors/generate_gguf.py
"""

import ctypes
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xllamacpp.xllamacpp as extension

ROW_LEN = 256
# Name -> number in ggml.h, values and bytes of a block.
TYPES = {
    "f16": (1, 1, 2),
    "q4_0": (2, 32, 18),
    "q5_0": (6, 32, 22),
    "q5_1": (7, 32, 24),
    "q8_0": (8, 32, 34),
    "q4_k": (12, 256, 144),
    "q5_k": (13, 256, 176),
    "q6_k": (14, 256, 210),
    "bf16": (30, 1, 2),
}
GGML = ctypes.PyDLL(extension.__file__)
GGML.ggml_quantize_chunk.restype = ctypes.c_size_t
GGML.ggml_quantize_chunk.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    *[ctypes.c_int64] * 3,
    ctypes.c_void_p,
]


def ggml_blocks(name: str, rows: np.ndarray, importance: np.ndarray | None) -> bytes:
    number, block_len, block_bytes = TYPES[name]
    out = np.zeros(rows.size // block_len * block_bytes, np.uint8)
    weights = None if importance is None else importance.ctypes.data
    GGML.ggml_quantize_chunk(number, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
    return out.tobytes()


def cases(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two rows each, with what makes a search go another way."""
    shape = (2, ROW_LEN)
    normal = rng.standard_normal(shape)
    special = np.zeros(shape)
    special[0, 32:64], special[0, 64:96], special[0, 96:128:2] = 1.5, -1.5, 3
    special[0, 128], special[0, 160:192], special[0, 192:224] = 1e-38, 1e-40, -0.0
    special[1, :128] = normal[1, :128] * np.repeat([1e-45, 1e-39, 1e-6, 1e4], 32)
    special[1, 128:] = normal[1, 128:] * 1e-20
    sparse = np.where(rng.random(shape) < 0.03, normal, 0)
    found = {
        "normal": normal * 0.02,
        "positive": np.abs(normal),
        "negative": -np.abs(normal) - 0.5,
        "halves": rng.integers(-254, 255, shape) / 2,
        "heavy tails": rng.standard_t(2, shape),
        "special": special,
        "sparse": sparse,
    }
    return {name: values.astype(np.float32) for name, values in found.items()}


def main() -> None:
    rng = np.random.default_rng(20261121)
    importance = (rng.random(ROW_LEN) ** 2 * (rng.random(ROW_LEN) < 0.9)).astype(np.float32)
    rows = [
        {
            "name": name,
            "values": values.tobytes().hex(),
            "plain": {kind: ggml_blocks(kind, values, None).hex() for kind in TYPES},
            "weighted": {kind: ggml_blocks(kind, values, importance).hex() for kind in TYPES if "q" in kind},
        }
        for name, values in cases(rng).items()
    ]
    document = {
        "source": f"ggml_quantize_chunk of xllamacpp {version('xllamacpp')}",
        "row_len": ROW_LEN,
        "importance": importance.tobytes().hex(),
        "cases": rows,
    }
    Path(__file__).with_name("gguf_blocks.json").write_text(json.dumps(document, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    main()
