"""Errors of the domain. Built-in exceptions are used wherever they mean the right thing."""


class MoeftError(Exception):
    """Base of every error that moeft raises on purpose."""


class CheckpointError(MoeftError, ValueError):
    """A checkpoint is incomplete, damaged, or not what the operation needs."""


class AdapterError(MoeftError, ValueError):
    """An adapter does not fit its base, or its layout cannot be told."""


class RecipeError(MoeftError, ValueError):
    """A recipe has an unknown key, a missing key, or a value that cannot be used."""


class RunFolderError(MoeftError, ValueError):
    """A run folder is busy, finished, damaged, or holds a run of something else."""


class MissingExtraError(MoeftError, ImportError):
    """An optional dependency is needed and absent; the message names the extra that brings it."""


class DataError(MoeftError, ValueError):
    """Rows of a data set cannot be used."""


class UnsupportedModelError(MoeftError, ValueError):
    """The model's family is unknown or its experts are laid out in a way moeft does not read."""


class AuditError(MoeftError):
    """A model is not in the state that was asked for, such as experts that are not 4-bit."""


class TrainingError(MoeftError, RuntimeError):
    """Training cannot go on, such as too many non-finite steps in a row."""


class ProofError(MoeftError, AssertionError):
    """A proof, such as equal logits or byte-identical tensors, did not hold."""


class ServingError(MoeftError, RuntimeError):
    """llama.cpp does not load a file, has stopped, or does not answer."""
