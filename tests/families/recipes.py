"""The small checkpoint of each family, by its name in models/families.py; recipe.py explains recipes."""

from __future__ import annotations

from recipe import Recipe
from recipes_gemma import GEMMA
from recipes_glm import GLM
from recipes_internvl import INTERNVL
from recipes_llava import LLAVA
from recipes_minicpm import MINICPM
from recipes_others import OTHERS
from recipes_qwen import QWEN

RECIPES: dict[str, Recipe] = QWEN | GLM | GEMMA | INTERNVL | LLAVA | MINICPM | OTHERS
