"""Continual instruction tuning with a mixture of LoRA experts (MoE-CL, arXiv 2509.18133)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecl.config import StreamConfig, Task, load_stream
    from moecl.engine import Engine, Prediction
    from moecl.errors import MoECLError
    from moecl.generation import Completion, Sampling
    from moecl.method_config import MoECLConfig
    from moecl.model import MoECL
    from moecl.results import Result
    from moecl.router import Router
    from moecl.store import Store
    from moecl.train import ContinualTrainer, learn

__all__ = [
    "Completion",
    "ContinualTrainer",
    "Engine",
    "MoECL",
    "MoECLConfig",
    "MoECLError",
    "Prediction",
    "Result",
    "Router",
    "Sampling",
    "Store",
    "StreamConfig",
    "Task",
    "learn",
    "load_stream",
]

_HOMES = {
    "Completion": "generation",
    "ContinualTrainer": "train",
    "Engine": "engine",
    "MoECL": "model",
    "MoECLConfig": "method_config",
    "MoECLError": "errors",
    "Prediction": "engine",
    "Result": "results",
    "Router": "router",
    "Sampling": "generation",
    "Store": "store",
    "StreamConfig": "config",
    "Task": "config",
    "learn": "train",
    "load_stream": "config",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import moecl` alone must not cost seconds of torch."""
    if name in _HOMES:
        return getattr(import_module(f"moecl.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'moecl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
