"""The registry: the only place where a method's name is looked at."""

from moecl.config import MethodConfig
from moecl.methods.base import Method
from moecl.methods.moe_cl import MoECLMethod
from moecl.nn.lora import Geometry

REGISTRY: dict[str, type[MoECLMethod]] = {MoECLMethod.name: MoECLMethod}


def make_method(config: MethodConfig, geometry: Geometry, seed: int) -> Method:
    return REGISTRY[config.name](config, geometry, seed)  # type: ignore[arg-type]
