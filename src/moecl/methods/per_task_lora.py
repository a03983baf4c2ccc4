"""Per-task LoRA: each task trains a LoRA of its own, from nothing; the tasks have nothing in common.

`y = W x + c B_t A_t x`. Nothing is forgotten, and nothing is passed on. Trains: one LoRA (rank 16) and the head.
Stores: these, frozen. Needs the task id to answer. Defaults: rank 16, scale 2, as many trained parameters as MoE-CL's
two experts of rank 8.
"""

from typing import ClassVar

from moecl.method_config import PerTaskLoRAConfig
from moecl.methods.one_lora import LoRAMethod


class PerTaskLoRA(LoRAMethod):
    name, config_type = "per-task-lora", PerTaskLoRAConfig
    shared: ClassVar[bool] = False
