"""Pretrain, fine-tune and inspect MiniMind language models from inside a notebook.

`import minimind_nb as mm`, then `mm.train(mm.TrainConfig(data_path="demo"))`. Importing
the package loads none of torch, matplotlib and ipywidgets; what is used does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig
    from .data.datasets import DPODataset, PretrainDataset, RLAIFDataset, SFTDataset
    from .data.faults import DataError
    from .data.tokenizer import load_tokenizer
    from .data.vocabulary_training import train_tokenizer
    from .diagnosis import doctor, verify
    from .examination import examine
    from .launch.verdict import TrainingFailed
    from .model.architecture import MiniMindConfig, MiniMindForCausalLM
    from .model.export import export
    from .model.generation import generate, stream
    from .model.interop import load
    from .monitor.comparison import compare
    from .monitor.dialogue import chat
    from .monitor.inspector import inspect
    from .monitor.metrics import History
    from .monitor.report import Run, runs
    from .planning import plan, preview
    from .storage.inputs import find_input, find_inputs, input_runs
    from .training.api import evaluate, train

__version__ = "0.1.0"

_HOMES = {
    "config": "TrainConfig",
    "data.datasets": "DPODataset PretrainDataset RLAIFDataset SFTDataset",
    "data.faults": "DataError",
    "data.tokenizer": "load_tokenizer",
    "data.vocabulary_training": "train_tokenizer",
    "diagnosis": "doctor verify",
    "examination": "examine",
    "launch.verdict": "TrainingFailed",
    "model.architecture": "MiniMindConfig MiniMindForCausalLM",
    "model.export": "export",
    "model.generation": "generate stream",
    "model.interop": "load",
    "monitor.comparison": "compare",
    "monitor.dialogue": "chat",
    "monitor.inspector": "inspect",
    "monitor.metrics": "History",
    "monitor.report": "Run runs",
    "planning": "plan preview",
    "storage.inputs": "find_input find_inputs input_runs",
    "training.api": "evaluate train",
}

__all__ = [
    "DPODataset",
    "DataError",
    "History",
    "MiniMindConfig",
    "MiniMindForCausalLM",
    "PretrainDataset",
    "RLAIFDataset",
    "Run",
    "SFTDataset",
    "TrainConfig",
    "TrainingFailed",
    "chat",
    "compare",
    "doctor",
    "evaluate",
    "examine",
    "export",
    "find_input",
    "find_inputs",
    "generate",
    "input_runs",
    "inspect",
    "load",
    "load_tokenizer",
    "plan",
    "preview",
    "runs",
    "stream",
    "train",
    "train_tokenizer",
    "verify",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            value = getattr(importlib.import_module(f".{home}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
