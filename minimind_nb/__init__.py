"""Pretrain, fine-tune and inspect MiniMind language models from inside a notebook.

`import minimind_nb as mm`, then `mm.train(mm.TrainConfig(data_path="demo"))`. Names load
on first use, so importing the package loads neither torch nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as` exports a name to type checkers
    from .benchmark import bench as bench
    from .config import TrainConfig as TrainConfig
    from .data.datasets import DPODataset as DPODataset
    from .data.datasets import PretrainDataset as PretrainDataset
    from .data.datasets import RLAIFDataset as RLAIFDataset
    from .data.datasets import SFTDataset as SFTDataset
    from .data.jsonl import DataError as DataError
    from .data.tokenizer import load_tokenizer as load_tokenizer
    from .data.tokenizer_training import train_tokenizer as train_tokenizer
    from .diagnosis import doctor as doctor
    from .diagnosis import verify as verify
    from .launch.outcome import TrainingFailed as TrainingFailed
    from .model.architecture import MiniMindConfig as MiniMindConfig
    from .model.architecture import MiniMindForCausalLM as MiniMindForCausalLM
    from .model.export import export as export
    from .model.generation import generate as generate
    from .model.generation import stream as stream
    from .model.loading import load as load
    from .monitor.chat import chat as chat
    from .monitor.comparison import compare as compare
    from .monitor.examination import examine as examine
    from .monitor.inspector import inspect as inspect
    from .monitor.metrics import History as History
    from .monitor.runs import Run as Run
    from .monitor.runs import runs as runs
    from .notebook import check_parameters as check_parameters
    from .notebook import find_runs as find_runs
    from .notebook import notebook_config as notebook_config
    from .notebook import train_demo_before as train_demo_before
    from .planning import plan as plan
    from .planning import preview as preview
    from .session import find_input as find_input
    from .session import find_inputs as find_inputs
    from .session import input_runs as input_runs
    from .training.api import evaluate as evaluate
    from .training.api import train as train

__version__ = "0.1.0"

_NAMES = {
    "benchmark": "bench",
    "config": "TrainConfig",
    "data.datasets": "DPODataset PretrainDataset RLAIFDataset SFTDataset",
    "data.jsonl": "DataError",
    "data.tokenizer": "load_tokenizer",
    "data.tokenizer_training": "train_tokenizer",
    "diagnosis": "doctor verify",
    "launch.outcome": "TrainingFailed",
    "model.architecture": "MiniMindConfig MiniMindForCausalLM",
    "model.export": "export",
    "model.generation": "generate stream",
    "model.loading": "load",
    "monitor.chat": "chat",
    "monitor.comparison": "compare",
    "monitor.examination": "examine",
    "monitor.inspector": "inspect",
    "monitor.metrics": "History",
    "monitor.runs": "Run runs",
    "notebook": "check_parameters find_runs notebook_config train_demo_before",
    "planning": "plan preview",
    "session": "find_input find_inputs input_runs",
    "training.api": "evaluate train",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)  # noqa: PLE0605 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
