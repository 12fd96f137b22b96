"""The demo: an embedded MoE, the data it learns from, and the run that proves every step."""
