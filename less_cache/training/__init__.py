"""Fitting φ and ψ to a model, layer by layer, then end to end; and the bases of codes."""

from .calibrate import calibrate
from .data import load_tokens
from .end_to_end import distill, distill_cache
from .per_layer import merge, train
from .recipe import RECIPES, DistillRecipe, Recipe

__all__ = [
    "RECIPES",
    "DistillRecipe",
    "Recipe",
    "calibrate",
    "distill",
    "distill_cache",
    "load_tokens",
    "merge",
    "train",
]
