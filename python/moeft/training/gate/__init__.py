"""A gate that training must pass: capabilities measured while it runs, and what happens when they fall."""

from moeft.training.gate.bounds import Bound, Reading
from moeft.training.gate.callback import CapabilityGate

__all__ = ["Bound", "CapabilityGate", "Reading"]
