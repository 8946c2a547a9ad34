"""The settings of a run, the known shapes and recipes, and how they combine.

Standard library only, so that a front end can build, check and explain a configuration
without loading torch.
"""

from .presets import CHANGEABLE_ON_RESUME as CHANGEABLE_ON_RESUME
from .presets import MIXTURE_FIELDS as MIXTURE_FIELDS
from .presets import PRESETS as PRESETS
from .presets import RECIPES as RECIPES
from .presets import SHAPE_FIELDS as SHAPE_FIELDS
from .presets import STAGE_BEFORE as STAGE_BEFORE
from .presets import STAGES as STAGES
from .presets import TRAINING_SHAPE_FIELDS as TRAINING_SHAPE_FIELDS
from .presets import WEIGHTS_NAMES as WEIGHTS_NAMES
from .presets import batch_follows_corpus as batch_follows_corpus
from .presets import count_parameters as count_parameters
from .presets import default_run_name as default_run_name
from .presets import fill_defaults as fill_defaults
from .presets import fit_batch as fit_batch
from .presets import flops_per_token as flops_per_token
from .presets import resolve_batch as resolve_batch
from .settings import PATH_FIELDS as PATH_FIELDS
from .settings import ResolvedConfig as ResolvedConfig
from .settings import TrainConfig as TrainConfig
from .settings import change_path as change_path
from .settings import kinds as kinds
from .settings import resolve as resolve
from .settings import shorten_home as shorten_home
from .validation import describe_unknown as describe_unknown
