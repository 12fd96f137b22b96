"""Optimisers for 16-bit weights, and learning rates of parameter groups."""

from moeft.training.optim.host_adamw import HostAdamW
from moeft.training.optim.loraplus import raise_rate_of_b
from moeft.training.optim.options import host_options
from moeft.training.optim.stochastic_adamw import StochasticAdamW
from moeft.training.optim.void_steps import nothing_if_void, reads_found_inf

__all__ = ["HostAdamW", "StochasticAdamW", "host_options", "nothing_if_void", "raise_rate_of_b", "reads_found_inf"]
