"""Joint multi-task LoRA: one LoRA trained on the rows of all tasks at once, shuffled: the usual upper bound.

`y = W x + c B A x`. It needs every task's rows at the same time, so it is no continual method: rows of R before the
last are not measured, and a finished run cannot learn a further task. Trains: one LoRA (rank 16), for as many steps as
the tasks would take one by one. Stores: one LoRA for all tasks. Needs no task id.
"""

from typing import ClassVar

from moecl.method_config import JointConfig
from moecl.methods.one_lora import LoRAMethod


class Joint(LoRAMethod):
    name, config_type = "joint", JointConfig
    shared: ClassVar[bool] = True
