"""Preference tuning: losses over pairs, log-probabilities under the reference and their cache, figures, stop rules."""
