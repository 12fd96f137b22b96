"""Recipes: YAML files checked against a schema, with ``key=value`` overrides.

:mod:`~moeft.config.document` reads YAML, :mod:`~moeft.config.recipe` checks it, :mod:`~moeft.config.problems` words
what is wrong with it, and each kind of recipe has a file of its own.
"""

from moeft.config.optimizer import validate_optimizer
from moeft.config.protection import Protection
from moeft.config.recipe import Recipe, Section, json_schema
from moeft.config.sft import SftRecipe, TuningRecipe, validate_training_fields

__all__ = [
    "Protection",
    "Recipe",
    "Section",
    "SftRecipe",
    "TuningRecipe",
    "json_schema",
    "validate_optimizer",
    "validate_training_fields",
]
