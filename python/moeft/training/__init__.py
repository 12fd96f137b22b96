"""Training on ``transformers.Trainer``: guards, losses, measurements."""
