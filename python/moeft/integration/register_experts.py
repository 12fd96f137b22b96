"""Announce the experts implementation. Imported when transformers' registry of such implementations is."""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeft.integration import experts_implementation

ALL_EXPERTS_FUNCTIONS.register(experts_implementation.NAME, experts_implementation.forward)
