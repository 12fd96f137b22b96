"""Write nf4_bitsandbytes.json: what bitsandbytes stores for ordinary and awkward inputs.

Run: python tests/vectors/generate_nf4.py (needs torch and bitsandbytes; the CPU backend is used).
Inputs and outputs are hex strings of little-endian bytes, so that Rust and Python read the same bits.
"""

import json
import math
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_blockwise, get_4bit_type, quantize_4bit, quantize_blockwise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_hex(tensor: torch.Tensor) -> str:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()


def wave(n: int) -> torch.Tensor:
    """Platform-independent values with a different absmax in each 64."""
    i = torch.arange(n, dtype=torch.float32)
    return ((i * 37 + 11) % 128 - 64) / 64 * 0.5 ** torch.div(i, 64, rounding_mode="floor")


def with_values(n: int, values: dict[int, float]) -> torch.Tensor:
    x = wave(n)
    for at, value in values.items():
        x[at] = value
    return x


def midpoint_block() -> torch.Tensor:
    """Every threshold and its two f32 neighbours, in one block whose absmax is 1."""
    code = get_4bit_type("nf4", device="cpu")
    midpoints = (code[:-1] + code[1:]) / 2
    below = torch.nextafter(midpoints, torch.tensor(-2.0))
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    return torch.cat([torch.ones(1), torch.stack([below, midpoints, above], 1).flatten(), torch.zeros(18)])


def rounding_block() -> torch.Tensor:
    """A block of 64 whose indices differ between `x / absmax` and `x * (1 / absmax)`: values next to thresholds."""
    code = get_4bit_type("nf4", device="cpu")
    midpoints = (code[:-1] + code[1:]) / 2
    generator = torch.Generator().manual_seed(0)
    while True:
        absmax = torch.rand(1, generator=generator) + 0.5
        at = midpoints * absmax
        near = [at, torch.nextafter(at, torch.tensor(-2.0)), torch.nextafter(at, torch.tensor(2.0))]
        block = torch.cat([absmax, *near, torch.zeros(18)])
        divided, multiplied = block / absmax, block * (1 / absmax)
        if (torch.bucketize(divided, midpoints) != torch.bucketize(multiplied, midpoints)).sum() >= 3:
            return block


def cases() -> list[tuple[str, str, int, torch.Tensor]]:
    nan, inf = math.nan, math.inf
    rows = [(f"wave of {n}", "float32", 64, wave(n)) for n in (1, 2, 63, 64, 65, 127, 128, 160)]
    rows += [(f"block size {size}", "float32", size, wave(size + 40)) for size in (32, 128, 4096)]
    rows += [
        ("rows of 96, not a multiple of the block", "float32", 64, wave(10 * 96)),
        ("thresholds and neighbours", "float32", 64, midpoint_block()),
        ("full block: reciprocal", "float32", 64, rounding_block()),
        ("short block: division", "float32", 64, rounding_block()[:50]),
        ("zero block", "float32", 64, torch.zeros(64)),
        ("negative zero block", "float32", 64, -torch.zeros(64)),
        ("zero tail", "float32", 64, torch.cat([wave(64), torch.zeros(3)])),
        ("NaN in a full block", "float32", 64, with_values(128, {70: nan})),
        ("NaN in the tail", "float32", 64, with_values(70, {69: nan})),
        ("infinities in a full block", "float32", 64, with_values(128, {3: inf, 9: -inf})),
        ("infinity in the tail", "float32", 64, with_values(70, {66: -inf, 67: inf})),
        ("NaN and infinity in one block", "float32", 64, with_values(64, {3: inf, 9: nan})),
        ("denormal absmax", "float32", 64, wave(64) * 1e-40),
        ("denormal absmax in the tail", "float32", 64, torch.cat([wave(64), wave(5) * 1e-40])),
        ("absmax around 1e-38", "float32", 64, wave(192) * 2e-38),
        ("largest floats", "float32", 64, wave(64) * torch.finfo(torch.float32).max),
    ]
    for dtype in ("bfloat16", "float16"):
        rows += [(f"wave of {n}", dtype, 64, wave(n)) for n in (64, 65, 160)]
        rows += [
            ("NaN in a full block", dtype, 64, with_values(128, {70: nan})),
            ("infinities in a full block", dtype, 64, with_values(128, {3: inf, 9: -inf})),
            ("zero block", dtype, 64, torch.zeros(64)),
            ("smallest magnitudes", dtype, 64, wave(64) * (1e-39 if dtype == "bfloat16" else 1e-7)),
        ]
    return rows


def quantised(name: str, dtype: str, block_size: int, values: torch.Tensor) -> dict:
    values = values.to(DTYPES[dtype])
    packed, state = quantize_4bit(values, blocksize=block_size, quant_type="nf4")
    row = {"name": name, "dtype": dtype, "block_size": block_size, "values": to_hex(values)}
    return row | {"packed": to_hex(packed.flatten()), "absmax": to_hex(state.absmax)}


def nested(name: str, absmax: torch.Tensor, offset: float) -> dict:
    codes, state = quantize_blockwise(absmax - torch.tensor(offset), blocksize=256)
    restored = dequantize_blockwise(codes, state) + torch.tensor(offset)
    row = {"name": name, "absmax": to_hex(absmax), "offset": to_hex(torch.tensor([offset])), "codes": to_hex(codes)}
    return row | {"absmax2": to_hex(state.absmax), "restored": to_hex(restored)}


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(600, generator=generator) * 0.05 + 0.02
    document = {
        "bitsandbytes": bitsandbytes.__version__,
        "quantised": [quantised(*case) for case in cases()],
        "nested": [
            nested("two blocks and a tail", scales, float(scales.mean())),
            nested("one value is its own mean", torch.tensor([0.25]), 0.25),
            nested("all equal", torch.full((300,), 0.5), 0.5),
            nested("one outlier", torch.cat([torch.full((299,), 0.03), torch.tensor([4.0])]), 0.0432),
            nested("denormal residuals", torch.tensor([1e-40, 0.0, 5e-41, 1e-45]), 0.0),
        ],
    }
    path = Path(__file__).with_name("nf4_bitsandbytes.json")
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
