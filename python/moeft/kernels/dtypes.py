"""Types of values that the kernels know."""

from typing import Literal

import torch

NAMES: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
"""What the Rust core calls them."""
