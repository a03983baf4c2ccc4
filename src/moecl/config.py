"""Typed settings <-> YAML <-> command line. Every key of a stream file is described once, here or in method_config."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from moecl import _raw, _yaml
from moecl._explain import Setting, explain, not_a_text, problem, settings
from moecl._settings import Settings
from moecl._yaml import Document, show
from moecl.errors import ConfigError, near
from moecl.method_config import MethodConfig, MoECLConfig, fill_settings, method_names, method_settings

Kind = Literal["classification", "generation"]
Metric = Literal["accuracy", "macro_f1", "exact_match", "rouge_l"]
Head = Literal["lm", "classifier"]

ANSWER_FIELDS: dict[str, str] = {"classification": "label", "generation": "completion"}
INSTRUCTIONS: dict[str, str] = {"classification": "{text}\nAnswer:", "generation": "{prompt}"}
TASK_METRICS: dict[str, tuple[Metric, ...]] = {
    "classification": ("accuracy", "macro_f1"),
    "generation": ("exact_match", "rouge_l"),
}

_Config = TypeVar("_Config", bound=Settings)
AUTO = "auto"  # in the place of a task's name: whichever task a text is for
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BRACES = re.compile(r"\{\{|\}\}|\{[^{}\n]+\}|[{}]")


class Task(Settings):
    """What a model must know of a task to answer for it."""

    name: str = Field(description="the task's name; usable as a file name")
    kind: Kind = Field(description="classification: a text to one of `labels`; generation: a prompt to a completion")
    instruction: str = Field(
        default="",
        description="what the model reads; {field} stands for a field of the row, and the answer follows after a space",
        json_schema_extra={"default": "{text}\\nAnswer:, for generation {prompt}"},
    )
    answer_field: str | None = Field(
        default=None, min_length=1, description="the field of a row that is learned; null: label, or completion"
    )
    labels: dict[str, str] | None = Field(
        default=None,
        description="the classes, or a map from each to the words the model writes for it; null: found in `train`",
    )
    metric: Metric = Field(
        default="accuracy",
        description="score of the task, which also chooses the best step; the first two for classification only",
        json_schema_extra={"default": "accuracy, for generation exact_match"},
    )
    head: Head | None = Field(default=None, description="how the answer is read; null: as the stream's `head` says")
    max_length: int | None = Field(
        default=None, ge=16, description="tokens of the whole input, answer included; null: train.max_length"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_kind(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("kind") not in TASK_METRICS:
            return data
        kind = data["kind"]
        filled = {
            key: value
            for key, value in data.items()
            if value is not None or key not in ("instruction", "metric", "labels")
        }
        defaults = {"instruction": INSTRUCTIONS[kind], "metric": TASK_METRICS[kind][0]}
        return defaults | ({"labels": {}} if kind == "generation" else {}) | filled

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise problem(
                f"{show(name)} cannot be a file name; use letters, digits, '.', '_' and '-', "
                "start with a letter or digit, and stay within 64 characters"
            )
        if name.casefold() == AUTO:
            raise problem(f"{show(name)} stands for whichever task a text is for; choose another name")
        return name

    @field_validator("instruction")
    @classmethod
    def _names_a_field(cls, instruction: str) -> str:
        braces = set(_BRACES.findall(instruction)) - {"{{", "}}"}
        if lone := braces & {"{", "}"}:
            brace = lone.pop()
            raise problem(f"{show(instruction)} has a lone {brace!r}; write {brace * 2!r} for a brace")
        if not braces:
            raise problem(
                f"{show(instruction)} has no field of a row in it; write {{text}} where the row's text belongs"
            )
        return instruction

    @property
    def answered_by(self) -> str:
        """The field of a row that has its answer."""
        return self.answer_field or ANSWER_FIELDS[self.kind]

    @field_validator("labels", mode="before")
    @classmethod
    def _label_words(cls, labels: Any) -> Any:
        if not isinstance(labels, list | tuple):
            return labels
        for index, label in enumerate(labels):
            if not isinstance(label, str):
                raise not_a_text(label, index)
            if label in labels[:index]:
                raise problem(f"{show(label)} is here twice; remove one", index)
        return {label: label for label in labels}

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        allowed = TASK_METRICS[self.kind]
        if self.metric not in allowed:
            raise problem(f"{self.metric!r} does not fit a {self.kind} task; give {' or '.join(allowed)}", "metric")
        if self.kind == "generation":
            if self.head == "classifier":
                raise problem("'classifier' cannot write the text of a generation task; give lm", "head")
            if self.labels:
                raise problem("a generation task has none; remove the key, or set kind: classification", "labels")
        elif self.labels is not None:
            _check_labels(self.labels)
        return self


def _check_labels(labels: dict[str, str]) -> None:
    if len(labels) < 2:
        raise problem(f"a classification needs at least two, not {len(labels)}; add the others", "labels")
    label_of: dict[str, str] = {}
    for label, words in labels.items():
        if not label.strip() or not words.strip():
            raise problem("holds an empty label; give each label a text", "labels", label)
        if first := label_of.get(words.strip()):
            both = f"{show(first)} and {show(label)} are both written {show(words)}"
            raise problem(f"{both}; give each its own words", "labels", label)
        label_of[words.strip()] = label


class Limit(Settings):
    """How many rows of each split are used: the first ones; null: all."""

    train: int | None = Field(default=None, ge=1, description="training rows used, from the first; null: all")
    validation: int | None = Field(default=None, ge=1, description="validation rows used, from the first; null: all")
    test: int | None = Field(default=None, ge=1, description="test rows used, from the first; null: all")


class TaskConfig(Task):
    """A task and where its rows are."""

    train: str = Field(
        min_length=1,
        description="training rows: a file (path relative to the stream's), user/name on the hub, "
        "hub:user/name/config:split, or asset:vader4/tweets/train",
    )
    validation: str | None = Field(
        default=None, min_length=1, description="rows that choose the best step; null: the last step is kept"
    )
    test: str | None = Field(default=None, min_length=1, description="rows that R is measured on; null: not measured")
    limit: Limit = Field(default_factory=Limit, description="the first rows only")

    @field_validator("limit", mode="before")
    @classmethod
    def _nothing_is_no_limit(cls, value: Any) -> Any:
        return {} if value is None else value


class TrainConfig(Settings):
    """How each task is trained."""

    epochs: int = Field(default=3, ge=1, description="passes over a task's training rows")
    batch_size: int = Field(default=16, ge=1, description="training rows a batch")
    lr: float = Field(default=2e-3, gt=0, description="peak learning rate of AdamW")
    max_length: int = Field(
        default=256, ge=16, description="tokens of the whole input, answer included; longer text is cut"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of everything that is drawn")
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of AdamW")
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1, description="share of a task's steps in which lr rises from 0")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="lr after the warm-up")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="batches an optimizer step")
    max_grad_norm: float = Field(default=1.0, ge=0, description="gradients are clipped to this norm; 0: never")
    evals_per_epoch: int = Field(default=1, ge=0, description="validation passes an epoch; 0: the last step is kept")
    early_stopping: int | None = Field(
        default=None, ge=1, description="stop after this many validation passes without a better score; null: never"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="dtype of the base; auto: bf16 where the processor is fast at it"
    )
    device: str = Field(default="auto", min_length=1, description="auto, cpu, cuda, cuda:1, mps ...")
    threads: int | None = Field(default=None, ge=1, description="processor threads; null: resolved at the first start")
    gradient_checkpointing: bool = Field(default=False, description="less memory, more time: recompute activations")
    eval_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens, padding included, in an evaluation batch; null: resolved at the first start",
    )
    prefix_cache: float = Field(
        default=10.0,
        ge=0,
        description="gigabytes of disk for what the layers below the adapted ones give (method.adapt_layers), which is "
        "then computed once a text: tokens x width x 4 bytes each, 2 in bf16; the oldest-used go first; 0: not kept",
    )
    save_steps: int = Field(default=50, ge=1, description="optimizer steps between checkpoints")
    report_to: list[str] = Field(
        default_factory=lambda: ["tensorboard"], description="trackers that transformers.Trainer reports to; []: none"
    )
    discriminator_lr: float | None = Field(
        default=None, gt=0, description="learning rate of the discriminator; null: lr"
    )

    @model_validator(mode="after")
    def _stopping_needs_validation(self) -> Self:
        if self.early_stopping and not self.evals_per_epoch:
            raise problem("needs validation passes; set evals_per_epoch to 1 or more, or remove it", "early_stopping")
        return self


PAPER_TRAIN: dict[str, Any] = {  # the last four are those of the published code, which the paper does not tell
    "epochs": 3,
    "batch_size": 8,
    "lr": 2e-4,
    "weight_decay": 0.01,
    "schedule": "constant",
    "warmup_ratio": 0.0,
    "max_grad_norm": 0.0,
    "evals_per_epoch": 3,
}


class StreamConfig(Settings):
    """A stream file: the base, the method, how to train, and the tasks in the order in which they are learned."""

    name: str | None = Field(default=None, description="the run's name, for reports; null: the run folder's")
    base: str = Field(min_length=1, description="the base model: an asset's name, a hub id or a folder")
    preset: Literal["paper"] | None = Field(
        default=None, description="paper: method, head and training as in arXiv 2509.18133; keys that are given win"
    )
    method: SerializeAsAny[MethodConfig] = Field(default_factory=MoECLConfig, description="the method and its settings")
    head: Head = Field(
        default="lm", description="how answers are read: lm: by the model's own words; classifier: by a linear layer"
    )
    evaluate: Literal["all", "seen", "next"] = Field(
        default="all", description="tasks tested after each task: all, those learned, or those and the next"
    )
    router: bool = Field(
        default=True, description="with each task learn to tell its texts from others', for answers without a task"
    )
    train: TrainConfig = Field(default_factory=TrainConfig, description="how each task is trained")
    tasks: list[TaskConfig] = Field(min_length=1, description="the tasks, in the order in which they are learned")

    @classmethod
    def chosen(cls, fields: dict[str, Any]) -> dict[str, type[BaseModel]]:
        name = str((_given(_named(fields.get("method"))) or {}).get("name"))
        return {"method": method_settings(name) if name in method_names() else MoECLConfig}

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("preset") != "paper":
            return data
        method, train = _given(_named(data.get("method"))), _given(data.get("train"))
        if method is None or train is None:
            return data
        name = str(method.get("name", "moe-cl"))
        method = {**method_settings(name).paper().model_dump(), **method} if name in method_names() else method
        return {"head": "classifier", **data, "method": method, "train": {**PAPER_TRAIN, **train}}

    @field_validator("train", mode="before")
    @classmethod
    def _nothing_is_default(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("method", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        given = _given(_named(value))
        if given is None or (isinstance(value, MethodConfig) and type(value) is not MethodConfig):
            return value
        name = given.get("name", "moe-cl")
        if not isinstance(name, str):
            raise not_a_text(name, "name")
        if name not in (known := method_names()):
            raise problem(f"{show(name)} is not a method; use one of: {', '.join(known)}{near(name, known)}", "name")
        return method_settings(name).model_validate({**given, "name": name})

    @model_validator(mode="after")
    def _tasks_go_together(self) -> Self:
        places: dict[str, int] = {}
        for index, task in enumerate(self.tasks):
            first = places.setdefault(task.name.casefold(), index)
            if first != index:
                same = "is used twice" if task.name == self.tasks[first].name else "differs in case only"
                raise problem(f"{task.name!r} {same} (see tasks[{first}]); rename one", "tasks", index, "name")
            if self.head == "classifier" and task.kind == "generation" and task.head is None:
                remedy = "write `head: lm` in this task"
                raise problem(f"a generation task cannot have the stream's head 'classifier'; {remedy}", "tasks", index)
        return self


def _named(method: Any) -> Any:
    """A method given by its name alone, as a section."""
    return {"name": method} if isinstance(method, str) else method


def _given(section: Any) -> dict[str, Any] | None:
    """The keys of a section that were given; None where it is not a section."""
    if section is None:
        return {}
    if isinstance(section, MethodConfig):
        return {**section.model_dump(exclude_unset=True), "name": section.name}
    if isinstance(section, BaseModel):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, Mapping) else None


def describe_settings(method: str = "moe-cl") -> list[Setting]:
    """Every key of a stream file as (key, type, default, description); `method` says whose settings are listed."""
    return settings(StreamConfig, {"method": method_settings(method)})


def load_stream(path: str | Path, overrides: Iterable[str] = (), recorded: bool = False) -> StreamConfig:
    """Read a stream file.

    Args:
        path: the YAML file. Paths in it are taken relative to its folder and made absolute; they need not exist.
        overrides: `key=value` each, as --set takes them: the key with dots ("tasks.agnews.limit.train"; a task by its
            name or its number from 0), the value in YAML. It means what it would mean in the file.
        recorded: a run's own file, which has all settings that were known when the run was started.

    Raises:
        ConfigError: one line with the file, the line and the key.
    """
    return stream_in(_yaml.read(path), path, overrides, recorded)


def stream_in(
    document: Document, path: str | Path, overrides: Iterable[str] = (), recorded: bool = False
) -> StreamConfig:
    """The stream of a file that was read before; `load_stream` tells the rest. Changes the document."""
    _raw.require_mapping(document)
    for setting in overrides:
        _raw.override(document, setting)
    if recorded:
        fill_unrecorded(document.data)
    folder = Path(path).parent.resolve()
    _raw.resolve_base(document, folder)
    tasks = document.data.get("tasks")
    for index in range(len(tasks) if isinstance(tasks, list) else 0):
        _raw.resolve_sources(document, ("tasks", index), folder)
    return _validated(StreamConfig, document)


def fill_unrecorded(stream: Mapping[str, Any]) -> None:
    """Give a recorded stream's method the settings that were not known when it was written."""
    if isinstance(method := stream.get("method"), dict):
        fill_settings(method.get("name"), method)


def load_task(path: str | Path) -> TaskConfig:
    """Read a file with one task: its keys alone, or a list `tasks` of one. Paths and errors as in `load_stream`."""
    document = _yaml.read(path)
    _raw.require_mapping(document)
    if "tasks" in document.data:
        tasks = document.data["tasks"]
        if not isinstance(tasks, list) or len(tasks) != 1:
            raise ConfigError(
                f"{document.where(('tasks',))}: tasks: must be a list of exactly one task; "
                "give a file with that task alone"
            )
        if extra := [key for key in document.data if key != "tasks"]:
            raise ConfigError(f"{document.where((extra[0],))}: {extra[0]}: does not belong in a task's file; remove it")
        document = document.part(("tasks", 0))
        _raw.require_mapping(document)
    _raw.resolve_sources(document, (), Path(path).parent.resolve())
    return _validated(TaskConfig, document)


def _validated(model: type[_Config], document: Document) -> _Config:
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        raise explain(error, settings(model, model.chosen(document.data)), document) from None


def anchored(config: StreamConfig) -> StreamConfig:
    """A stream made in Python, its relative paths from the working folder of now, as a run goes on from any."""
    return stream_in(Document("stream", config.model_dump(exclude_none=True)), Path.cwd() / "stream.yaml")


def anchored_task(task: TaskConfig) -> TaskConfig:
    """The same of one task."""
    document = Document(f"task {task.name!r}", task.model_dump())
    _raw.resolve_sources(document, (), Path.cwd())
    return TaskConfig.model_validate(document.data)


def dump_stream(config: StreamConfig) -> str:
    """YAML that `load_stream` reads back to an equal config; what is null is left out."""
    data = config.model_dump(exclude_none=True)
    for task in data["tasks"]:
        labels = task.get("labels")
        if labels is not None and all(label == words for label, words in labels.items()):
            task["labels"] = list(labels)
        for key in ("labels", "limit"):
            if not task.get(key):
                task.pop(key, None)
    return _yaml.dump(data)
