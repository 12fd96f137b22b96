"""The server that the xllamacpp package carries, as a program: ``python -m moeft.serving.embedded FILE OPTIONS``.

A process of its own, since llama.cpp ends the process that it runs in when a file makes it stumble. It prints its
address on one line of its standard output, and nothing else there, and serves until its standard input is closed, so it
never outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from moeft.serving.options import ServeOptions


def settings(file: str, options: ServeOptions) -> Any:
    """The same options in the words of xllamacpp."""
    import xllamacpp

    found = xllamacpp.CommonParams()
    found.model.path = file
    found.model_alias = {options.name} if options.name else set()
    found.hostnames, found.port = [options.host], options.port
    found.n_ctx, found.n_parallel = options.context * options.parallel, options.parallel
    found.n_gpu_layers, found.warmup, found.use_jinja = options.gpu_layers, False, True
    # What a model writes on its thought channel goes to "reasoning_content", not to "content".
    found.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_AUTO
    if options.threads is not None:
        found.cpuparams.n_threads = found.cpuparams_batch.n_threads = options.threads
    if options.exact:
        found.cache_type_k = found.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        found.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Without it, a cache of sliding windows is taken up from another prompt after prompts of one token.
        found.swa_full = True
    return found


def main(file: str, options: str) -> None:
    """Serve until standard input ends."""
    import xllamacpp

    # Nobody reads the pipe after the address, so what llama.cpp says goes where errors go.
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        server = xllamacpp.Server(settings(file, ServeOptions(**json.loads(options))))
        print(server.listening_address, file=answer)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
