"""Fitting φ and ψ to a model: layer by layer, then end to end."""

from .calibrate import calibrate
from .data import load_tokens
from .end_to_end import DistillRecipe, distill
from .per_layer import merge, train
from .recipe import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "DistillRecipe",
    "Recipe",
    "calibrate",
    "distill",
    "load_tokens",
    "merge",
    "train",
]
