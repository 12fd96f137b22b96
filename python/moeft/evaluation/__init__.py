"""Evaluation: generation, text metrics and tool protocols."""
