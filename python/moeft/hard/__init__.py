"""Hard preference pairs from tools and conversations, what a model's failures on them are, and the pairs against these.

Builds and judges texts; loads no model.
"""
