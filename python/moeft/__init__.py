"""Fine-tune Mixture-of-Experts language models on the hardware people have."""

from moeft._core import __version__

__all__ = ["__version__"]
