"""``optim_args`` of the trainer for :class:`moeft.training.optim.HostAdamW`."""

from __future__ import annotations

from typing import Any


def host_options(optim_args: str | None) -> dict[str, Any]:
    """Options written as transformers writes them, ``master_weights=false,min_8bit_size=0``.

    Raises:
        ValueError: If an option is unknown or its value cannot be used.
    """
    options: dict[str, Any] = {}
    for item in filter(None, (optim_args or "").replace(" ", "").split(",")):
        name, _, value = item.partition("=")
        if name == "master_weights" and value.lower() in ("true", "false"):
            options[name] = value.lower() == "true"
        elif name == "min_8bit_size" and value.isdecimal():
            options[name] = int(value)
        else:
            raise ValueError(
                f"optim_args has {item!r}, expected master_weights=true or false, or min_8bit_size=COUNT, for "
                "moeft's optimisers"
            )
    return options
