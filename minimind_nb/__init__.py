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
    from .data.jsonl import DataError
    from .data.tokenizer import load_tokenizer
    from .data.tokenizer_training import train_tokenizer
    from .diagnosis import doctor, verify
    from .launch.outcome import TrainingFailed
    from .model.architecture import MiniMindConfig, MiniMindForCausalLM
    from .model.export import export
    from .model.generation import generate, stream
    from .model.loading import load
    from .monitor.chat import chat
    from .monitor.comparison import compare
    from .monitor.examination import examine
    from .monitor.inspector import inspect
    from .monitor.metrics import History
    from .monitor.runs import Run, runs
    from .planning import plan, preview
    from .session import find_input, find_inputs, input_runs
    from .training.api import evaluate, train

__version__ = "0.1.0"

_HOMES = {
    "DPODataset": "data.datasets",
    "DataError": "data.jsonl",
    "History": "monitor.metrics",
    "MiniMindConfig": "model.architecture",
    "MiniMindForCausalLM": "model.architecture",
    "PretrainDataset": "data.datasets",
    "RLAIFDataset": "data.datasets",
    "Run": "monitor.runs",
    "SFTDataset": "data.datasets",
    "TrainConfig": "config",
    "TrainingFailed": "launch.outcome",
    "chat": "monitor.chat",
    "compare": "monitor.comparison",
    "doctor": "diagnosis",
    "evaluate": "training.api",
    "examine": "monitor.examination",
    "export": "model.export",
    "find_input": "session",
    "find_inputs": "session",
    "generate": "model.generation",
    "input_runs": "session",
    "inspect": "monitor.inspector",
    "load": "model.loading",
    "load_tokenizer": "data.tokenizer",
    "plan": "planning",
    "preview": "planning",
    "runs": "monitor.runs",
    "stream": "model.generation",
    "train": "training.api",
    "train_tokenizer": "data.tokenizer_training",
    "verify": "diagnosis",
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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
