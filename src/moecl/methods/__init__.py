"""The registry: the only place where a method's name is looked at."""

from moecl.method_config import METHODS, MethodConfig, plugin
from moecl.methods.base import Method
from moecl.methods.ewc import EWC
from moecl.methods.joint import Joint
from moecl.methods.mocl import MoCL
from moecl.methods.moe_cl import MoECLMethod
from moecl.methods.n_lora import NLoRA
from moecl.methods.o_lora import OLoRA
from moecl.methods.osft import OSFT
from moecl.methods.per_task_lora import PerTaskLoRA
from moecl.methods.replay import Replay
from moecl.methods.sequential_full import SequentialFull
from moecl.methods.sequential_lora import SequentialLoRA
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry

REGISTRY: dict[str, type[Method]] = {
    method.name: method
    for method in (
        MoECLMethod,
        PerTaskLoRA,
        SequentialLoRA,
        SequentialFull,
        Joint,
        Replay,
        EWC,
        OLoRA,
        MoCL,
        OSFT,
        NLoRA,
    )
}


def find_method(name: str) -> type[Method]:
    """A method of ours, or a plug-in's. KeyError, ConfigError."""
    return REGISTRY[name] if name in METHODS else plugin(name)


def make_method(config: MethodConfig, geometry: Geometry, seed: int, base: Injected | None = None) -> Method:
    return find_method(config.name)(config, geometry, seed, base)
