"""Sequential LoRA, the MoE-CL paper's FT-P: one LoRA is trained on task after task, and forgets.

`y = W x + c B A x`. Trains: the LoRA (rank 16) and the task's head. Stores: one LoRA for all tasks, as it is after the
last. Needs no task id, but that a head or the labels of a task be read. The lower bound of continual learning.
"""

from typing import ClassVar

from moecl.method_config import SequentialLoRAConfig
from moecl.methods.one_lora import LoRAMethod


class SequentialLoRA(LoRAMethod):
    name, config_type = "sequential-lora", SequentialLoRAConfig
    shared: ClassVar[bool] = True
