"""Training that leaves a subspace of the weights alone; see ``docs/protection.md``."""

from moeft.training.protection.callback import SubspaceProtection

__all__ = ["SubspaceProtection"]
