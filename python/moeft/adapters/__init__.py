"""Adapters on disk: in which of the layouts in use one is, and how to get it into another. Moves elements, no math."""

from moeft.adapters.convert import convert
from moeft.adapters.layout import Layout
from moeft.adapters.verify import Verification, verify

__all__ = ["Layout", "Verification", "convert", "verify"]
