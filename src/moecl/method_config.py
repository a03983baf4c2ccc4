"""Settings of the methods, by their names in the registry. Plug-ins bring their own: entry points `moecl.methods`."""

import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from moecl._explain import problem
from moecl._settings import Settings
from moecl.errors import ConfigError

ENTRY_POINTS = "moecl.methods"


class MethodConfig(Settings):
    """What the settings of all methods have in common."""

    keeps_rows: ClassVar[str] = ""  # how it comes to rows of earlier tasks, in words; nothing: it is rehearsal-free
    learns_together: ClassVar[bool] = False  # whether it learns all tasks of a stream at once, at its end
    trains: ClassVar[str] = ""  # in words, for `moecl methods`
    stores: ClassVar[str] = ""
    needs_task: ClassVar[bool] = False  # whether an answer depends on which task is asked
    unrecorded: ClassVar[Mapping[str, Any]] = {}  # settings of a run or store from before they were known

    name: str = Field(description="see `moecl methods`")
    adapt_layers: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        default="all", description="which FFNs are adapted: all, or those of the last n layers"
    )

    @classmethod
    def paper(cls) -> Self:
        """The settings of the paper that `preset: paper` follows; the defaults where the method is not in it."""
        return cls.model_validate({})


class MoECLConfig(MethodConfig):
    """MoE-CL, arXiv 2509.18133."""

    trains: ClassVar[str] = "a shared and a task expert, gate, discriminator"
    stores: ClassVar[str] = "each task's experts and gate"
    needs_task: ClassVar[bool] = True
    unrecorded: ClassVar[Mapping[str, Any]] = {"lora_A_lr": 1.0, "nested": False}

    name: Literal["moe-cl"] = Field(default="moe-cl", description="see `moecl methods`")
    rank: int = Field(default=8, ge=1, description="rank r of each LoRA pair")
    lora_alpha: float = Field(
        default=32.0,
        gt=0,
        description="scale lora_alpha / rank of a task's expert: twice the usual, as a new gate halves it; "
        "the shared one has half of it if nested",
    )
    lora_A_lr: float = Field(default=0.1, gt=0, description="factor on train.lr for lora_A of both experts")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout in front of lora_A; above 0 is slower")
    retention: Literal["exact", "live"] = Field(
        default="exact",
        description="exact: a finished task's outputs never change; live: the shared expert moves on under it",
    )
    nested: bool = Field(
        default=True,
        description="a task's expert adds to the shared one, which has half the scale; false: stands beside it",
    )
    gate: Literal["task", "shared"] = Field(default="task", description="one gate a task, or one for all tasks")
    gate_std: float = Field(default=0.0, ge=0, description="standard deviation of a new gate's weights; 0: zeros")
    alpha: float = Field(default=0.1, ge=0, description="weight of the adversary; 0 turns it off")
    discriminator_memory: Literal["gaussian", "none"] = Field(
        default="gaussian", description="how the discriminator remembers old tasks; none: as in the paper, not at all"
    )
    warm_start: Literal["zero", "shared", "nearest"] = Field(
        default="zero",
        description="a new task's expert: no change, the shared one (not if nested), or the old one that fits best",
    )
    experts: Literal["both", "task", "shared"] = Field(
        default="both",
        description="an ablation: task leaves out the shared expert and its adversary, shared the task's",
    )

    @field_validator("warm_start")
    @classmethod
    def _once_what_is_shared(cls, warm_start: str, info: ValidationInfo) -> str:
        if warm_start == "shared" and info.data.get("nested"):
            raise problem(
                "'shared' would add the shared expert twice, as a nested one adds to it; set nested: false too"
            )
        return warm_start

    @classmethod
    def paper(cls) -> Self:
        """The settings of arXiv 2509.18133 and its published code."""
        return cls(
            lora_alpha=16.0,
            lora_A_lr=1.0,
            dropout=0.05,
            nested=False,
            retention="live",
            gate="shared",
            gate_std=0.02,
            discriminator_memory="none",
        )


class LoRAConfig(MethodConfig):
    """A method of one LoRA a task: of rank 16, as many trainable parameters as MoE-CL's two experts of rank 8."""

    rank: int = Field(default=16, ge=1, description="rank r of each LoRA pair")
    lora_alpha: float = Field(default=32.0, gt=0, description="LoRA scale: lora_alpha / rank")
    lora_A_lr: float = Field(default=1.0, gt=0, description="factor on train.lr for lora_A, as in LoRA+")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout in front of lora_A")


class PerTaskLoRAConfig(LoRAConfig):
    """A LoRA of its own for each task, and nothing in common."""

    trains: ClassVar[str] = "a LoRA a task"
    stores: ClassVar[str] = "each task's LoRA"
    needs_task: ClassVar[bool] = True

    name: Literal["per-task-lora"] = Field(default="per-task-lora", description="see `moecl methods`")


class SequentialLoRAConfig(LoRAConfig):
    """One LoRA, trained on task after task (the paper's FT-P)."""

    trains: ClassVar[str] = "one LoRA"
    stores: ClassVar[str] = "one LoRA for all tasks"

    name: Literal["sequential-lora"] = Field(default="sequential-lora", description="see `moecl methods`")


class SequentialFullConfig(MethodConfig):
    """The FFNs themselves, trained on task after task (the paper's FT-F)."""

    trains: ClassVar[str] = "the adapted FFNs"
    stores: ClassVar[str] = "one set of their weights for all tasks"

    name: Literal["sequential-full"] = Field(default="sequential-full", description="see `moecl methods`")


class JointConfig(LoRAConfig):
    """One LoRA, trained on all tasks' rows at once: the upper bound, not a continual method."""

    keeps_rows: ClassVar[str] = "sees all tasks' data at once"
    learns_together: ClassVar[bool] = True
    trains: ClassVar[str] = "one LoRA, on all tasks at once"
    stores: ClassVar[str] = "one LoRA for all tasks"

    name: Literal["joint"] = Field(default="joint", description="see `moecl methods`")


class ReplayConfig(LoRAConfig):
    """One LoRA, trained on each task's rows and on some that were kept of earlier tasks."""

    keeps_rows: ClassVar[str] = "keeps rows of old tasks"
    trains: ClassVar[str] = "one LoRA"
    stores: ClassVar[str] = "one LoRA for all tasks, rows of each"

    name: Literal["replay"] = Field(default="replay", description="see `moecl methods`")
    share: float = Field(default=0.05, gt=0, le=1, description="share of each task's training rows that is kept")


class EWCConfig(LoRAConfig):
    """Online elastic weight consolidation of one LoRA, arXiv 1612.00796 and 1805.06370."""

    trains: ClassVar[str] = "one LoRA"
    stores: ClassVar[str] = "one LoRA for all tasks"

    name: Literal["ewc"] = Field(default="ewc", description="see `moecl methods`")
    strength: float = Field(default=1000.0, ge=0, description="weight of the penalty, lambda")
    decay: float = Field(default=0.9, ge=0, le=1, description="what is left of the old Fisher information after a task")
    fisher_rows: int = Field(default=64, ge=1, description="training rows that a task's Fisher information is from")


class OLoRAConfig(LoRAConfig):
    """O-LoRA, arXiv 2310.14152: each task's LoRA is orthogonal to the earlier ones; all are added up."""

    trains: ClassVar[str] = "a LoRA a task"
    stores: ClassVar[str] = "the sum of all tasks' LoRAs"

    name: Literal["o-lora"] = Field(default="o-lora", description="see `moecl methods`")
    orthogonality: float = Field(default=0.5, ge=0, description="weight of the overlap with earlier tasks, lambda_1")


class NLoRAConfig(LoRAConfig):
    """N-LoRA, arXiv 2410.10179: each task's LoRA is sparse, so that tasks collide less; all are added up."""

    trains: ClassVar[str] = "a LoRA a task"
    stores: ClassVar[str] = "the sum of all tasks' LoRAs"

    name: Literal["n-lora"] = Field(default="n-lora", description="see `moecl methods`")
    sparsity: float = Field(default=0.4, ge=0, description="weight of the l1 norm of a task's LoRA, lambda")


class MoCLConfig(LoRAConfig):
    """MoCL, arXiv 2404.00790: LoRAs of all tasks so far, weighed by how near a text is to their keys."""

    trains: ClassVar[str] = "a LoRA and a key a task"
    stores: ClassVar[str] = "each task's LoRA and key"
    needs_task: ClassVar[bool] = True

    name: Literal["mocl"] = Field(default="mocl", description="see `moecl methods`")
    sharpness: float = Field(default=8.0, ge=0, description="how much a likelier LoRA outweighs the others")


class OSFTConfig(MethodConfig):
    """OSFT, arXiv 2504.07097: the FFNs' low singular directions are trained, the high ones kept (PEFT's OSF tuner)."""

    trains: ClassVar[str] = "low directions of the adapted FFNs"
    stores: ClassVar[str] = "one set of their weights for all tasks"

    name: Literal["osft"] = Field(default="osft", description="see `moecl methods`")
    preserved: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="share of the singular directions kept while the first task is learned; it grows to 1",
    )


METHODS: dict[str, type[MethodConfig]] = {
    str(config.model_fields["name"].default): config
    for config in (
        MoECLConfig,
        PerTaskLoRAConfig,
        SequentialLoRAConfig,
        SequentialFullConfig,
        JointConfig,
        ReplayConfig,
        EWCConfig,
        OLoRAConfig,
        MoCLConfig,
        OSFTConfig,
        NLoRAConfig,
    )
}


def method_names() -> list[str]:
    return [*METHODS, *(name for name in plugins() if name not in METHODS)]


def method_settings(name: str) -> type[MethodConfig]:
    """The settings of a method or plug-in. KeyError where there is none; ConfigError for a plug-in that is broken."""
    return METHODS[name] if name in METHODS else plugin(name).config_type


def fill_settings(name: object, settings: dict[str, Any]) -> None:
    """Give a method's recorded settings those that were not known when they were written, as they were in effect."""
    if name in method_names():
        for key, value in method_settings(str(name)).unrecorded.items():
            settings.setdefault(key, value)


@cache
def plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def plugin(name: str) -> Any:
    """The method class that an installed package names. KeyError, ConfigError."""
    point = plugins()[name]
    try:
        return point.load()
    except Exception as error:  # whatever another's code raises when it is imported
        raise ConfigError(
            f"method {name}: {point.value} cannot be loaded ({error}); repair or remove its package"
        ) from error


def describe(name: str) -> dict[str, str]:
    """A method in words: name, summary, what it trains and stores, what it needs. KeyError, ConfigError."""
    config = method_settings(name)
    needs = ["the task's name"] * config.needs_task + ["rows of other tasks"] * bool(config.keeps_rows)
    summary = (inspect.getdoc(config) or name).splitlines()[0]
    return {
        "name": name,
        "summary": summary,
        "trains": config.trains,
        "stores": config.stores,
        "needs": ", ".join(needs) or "nothing",
    }
