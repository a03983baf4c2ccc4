"""What a stream's settings come to on this machine: devices and sizes, model and method, trackers."""

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec

import torch
from transformers import TrainerCallback

from moecl.backbone import Backbone, batch_tokens, resolve_device, resolve_precision
from moecl.config import StreamConfig, Task
from moecl.course import Watcher
from moecl.errors import ConfigError
from moecl.method_config import MoECLConfig
from moecl.methods import make_method
from moecl.methods.base import Method
from moecl.model import MoECL
from moecl.run_folder import RunFolder


def resolve(config: StreamConfig, watcher: Watcher) -> StreamConfig:
    """Settle what is left to the machine, once: a run that goes on elsewhere keeps to it."""
    train = config.train
    device = resolve_device(train.device)
    precision, why = resolve_precision(train.precision, device)
    if train.precision == "auto":
        watcher.note(f"precision {precision}: {why}")
    settled = {
        "device": device,
        "precision": precision,
        "threads": train.threads or torch.get_num_threads(),
        "eval_batch_tokens": train.eval_batch_tokens or batch_tokens(device),
    }
    return config.model_copy(update={"train": train.model_copy(update=settled)})


def attach(backbone: Backbone, config: StreamConfig) -> tuple[MoECL, Method]:
    method = config.method
    settings = (
        method
        if isinstance(method, MoECLConfig)
        else MoECLConfig(adapt_layers=method.adapt_layers, dropout=getattr(method, "dropout", 0.0))
    )
    model = MoECL(backbone, settings, config.train.seed)
    return model, attach_method(model, config)


def attach_method(model: MoECL, config: StreamConfig) -> Method:
    method = make_method(config.method, model.geometry, config.train.seed, model.injected)
    method.state.to(model.device)
    return method


def check_heads(config: StreamConfig, tasks: Iterable[Task]) -> None:
    """Raises ConfigError where rows of several tasks would meet in a batch that must not."""
    if config.method.keeps_rows and any(task.head == "classifier" for task in tasks):
        raise ConfigError(
            f"method: {config.method.name} trains on rows of several tasks at once, which need one head; set head: lm"
        )


def trackers(names: Sequence[str], watcher: Watcher) -> list[Callable[[RunFolder, str], TrainerCallback]]:
    """Makers of the callbacks that report a task's training. Raises ConfigError for a tracker that is not there."""
    from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

    def tensorboard(folder: RunFolder, task: str) -> TrainerCallback:
        from torch.utils.tensorboard import SummaryWriter

        return TensorBoardCallback(SummaryWriter(str(folder.tensorboard / task)))  # type: ignore[no-untyped-call]

    found: list[Callable[[RunFolder, str], TrainerCallback]] = []
    if "tensorboard" in names:
        if find_spec("tensorboard"):
            found.append(tensorboard)
        else:
            watcher.note("no TensorBoard: it is not installed (pip install 'moecl[tensorboard]')")
    try:
        others = [name for name in names if name != "tensorboard"]
        types = get_reporting_integration_callbacks(others)  # type: ignore[no-untyped-call]
        for type_ in types:
            type_()  # refuses where its package is missing
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"train.report_to: {error}; correct it, or install what it needs") from error
    return [*found, *(lambda folder, task, type_=type_: type_() for type_ in types)]
