"""Optimisers with their state on the host, and learning rates of parameter groups."""

from moeft.training.optim.host_adamw import HostAdamW
from moeft.training.optim.loraplus import raise_rate_of_b
from moeft.training.optim.options import host_options

__all__ = ["HostAdamW", "host_options", "raise_rate_of_b"]
