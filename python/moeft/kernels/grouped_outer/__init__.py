"""Sums of outer products over rows sorted by expert: the gradients of low-rank factors."""
