"""The settings of a run, the known shapes and recipes, and how they combine.

Standard library only, so that a front end can build, check and explain a configuration
without loading torch.
"""

from .presets import (
    CHANGEABLE_ON_RESUME,
    MIXTURE_FIELDS,
    PRESETS,
    RECIPES,
    SHAPE_FIELDS,
    STAGE_BEFORE,
    STAGES,
    TRAINING_SHAPE_FIELDS,
    WEIGHTS_NAMES,
    count_parameters,
    fill_defaults,
    resolve_batch,
)
from .settings import (
    PATH_FIELDS,
    ResolvedConfig,
    TrainConfig,
    kinds,
    resolve,
    shorten_home,
)
from .validation import describe_unknown

__all__ = [
    "CHANGEABLE_ON_RESUME",
    "MIXTURE_FIELDS",
    "PATH_FIELDS",
    "PRESETS",
    "RECIPES",
    "ResolvedConfig",
    "SHAPE_FIELDS",
    "STAGES",
    "STAGE_BEFORE",
    "TRAINING_SHAPE_FIELDS",
    "TrainConfig",
    "WEIGHTS_NAMES",
    "count_parameters",
    "describe_unknown",
    "fill_defaults",
    "kinds",
    "resolve",
    "resolve_batch",
    "shorten_home",
]
