"""What MoE-CL trains, from the first task to the last: https://arxiv.org/abs/2509.18133, eq. 3-10.

One shared expert and the adversary live as long as the model; a task expert, and a gate and a head of its own, are
made when a task begins. `finish` hands back the parts that answer for the task from then on.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moecl.method_config import MoECLConfig
from moecl.nn.call import Parts
from moecl.nn.discriminator import Adversary
from moecl.nn.forms import frozen_copy, tensors
from moecl.nn.lora import Expert, Gate, Geometry
from moecl.nn.moe_ffn import Gated, Nested
from moecl.nn.sums import Sum

HEAD_STD = 0.02  # as transformers draws a classification head


def seeded(seed: int, *words: object) -> torch.Generator:
    """A generator of its own for each purpose: what one task draws does not move what the next one draws."""
    digest = hashlib.sha256(repr((seed, *words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def new_head(labels: int, hidden_size: int, generator: torch.Generator) -> nn.Linear:
    head = nn.Linear(hidden_size, labels, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * HEAD_STD)
    return head


class GatedLearner(nn.Module):
    """The trained state of MoE-CL. A module, so that its state dict is the checkpoint of a step."""

    task: Expert | None
    own_gate: Gate | None
    head: nn.Linear | None

    def __init__(self, geometry: Geometry, config: MoECLConfig, seed: int = 0) -> None:
        super().__init__()
        self.geometry, self.config, self.seed = geometry, config, seed
        self.shared = Expert(geometry, config.rank).reset(seeded(seed, "shared"))
        self.gate = Gate(geometry).reset(seeded(seed, "gate"), config.gate_std) if config.gate == "shared" else None
        self.adversary = (
            Adversary(geometry, config.alpha, config.discriminator_memory == "gaussian")
            if config.alpha > 0 and config.experts != "task"
            else None
        )
        self.task = self.own_gate = self.head = None

    @property
    def form(self) -> type[Gated]:
        return Nested if self.config.nested else Gated

    @property
    def scale(self) -> float:
        return self.config.lora_alpha / self.config.rank

    def begin(self, name: str, labels: int = 0, start: Parts | None = None) -> Parts:
        """Trainable parts for a task, fresh or a copy of `start`; `labels` > 0 gives it a classifier head."""
        assert self.task is None, "finish the task under way first"
        fresh = self._fresh(name, labels, start)
        if isinstance(start, Gated) and start.shared is not self.shared:
            self.shared.load_state_dict(start.shared.state_dict())
        self.task, self.head = fresh.task, fresh.head
        self.own_gate = None if self.gate is not None else fresh.gate
        if self.adversary is not None:
            self.adversary.grow(seeded(self.seed, self.adversary.classes, "active"))
        self.requires_grad_(False)
        for p in (p for group in self.groups().values() for p in group):
            p.requires_grad_(True)
        device = next(self.shared.parameters()).device
        self.to(device)
        return self.parts()

    def preview(self, name: str, labels: int = 0) -> Parts:
        """The parts a task has before its first step."""
        return self._answering(self._fresh(name, labels))

    def like(self, old: Parts) -> Parts | None:
        """What a task starts as from the finished `old` one: exactly as that one answers, its copy of the shared expert
        included; with retention `live` beside the shared expert of now, with one gate for all by that of now. None
        where it has no expert of this rank.
        """
        modules = old.modules()
        task, gate, shared = (modules.get(self._task), self.gate or modules.get("gate"), modules.get("shared"))
        if not isinstance(task, Expert) or task.rank != self.config.rank or self.config.experts == "shared":
            return None
        if self.config.experts == "task":
            return Sum(task, self.scale)
        assert isinstance(gate, Gate)
        assert isinstance(shared, Expert)
        return self.form(shared if self.config.retention == "exact" else self.shared, task, gate, self.scale)

    @property
    def _task(self) -> str:
        """What a finished task's own expert is called."""
        return "lora" if self.config.experts == "task" else "task"

    def _fresh(self, name: str, labels: int, start: Parts | None = None) -> Gated:
        device = next(self.shared.parameters()).device
        task = Expert(self.geometry, self.config.rank).reset(seeded(self.seed, name, "task"))
        gate = self.gate or Gate(self.geometry).reset(seeded(self.seed, name, "gate"), self.config.gate_std)
        if start is not None:
            modules = start.modules()
            task.load_state_dict(modules[self._task].state_dict())
            if self.gate is None and "gate" in modules:
                gate.load_state_dict(modules["gate"].state_dict())
        elif self.config.warm_start == "shared":
            task.load_state_dict(self.shared.state_dict())
        head = new_head(labels, self.geometry.hidden_size, seeded(self.seed, name, "head")) if labels else None
        return self.form(self.shared, task.to(device), gate.to(device), self.scale, head.to(device) if head else None)

    def _answering(self, parts: Gated) -> Parts:
        """All of them, or for the ablations one expert alone."""
        if self.config.experts == "both":
            return parts
        return Sum(parts.task if self.config.experts == "task" else parts.shared, parts.scale, parts.head)

    def _all(self) -> Gated:
        gate = self.gate or self.own_gate
        assert self.task is not None, "no task under way"
        assert gate is not None
        return self.form(self.shared, self.task, gate, self.scale, self.head)

    def parts(self) -> Parts:
        return self._answering(self._all())

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What the task under way trains: both experts' lora_A, all else on their side, and the discriminator."""
        idle = {"both": (), "task": ("shared.", "gate.", "own_gate."), "shared": ("task.", "gate.", "own_gate.")}
        out = ("adversary.", *idle[self.config.experts])
        ours = [(name, p) for name, p in self.named_parameters() if not name.startswith(out)]
        return {
            "lora_A": [p for name, p in ours if name.endswith("lora_A")],
            "experts": [p for name, p in ours if not name.endswith("lora_A")],
            "discriminator": [] if self.adversary is None else list(self.adversary.parameters()),
        }

    def rates(self) -> dict[str, float]:
        """Group -> its learning rate, as a share of the whole's; 1 where it is not said (LoRA+, arXiv 2402.12354)."""
        return {"lora_A": self.config.lora_A_lr}

    def loss(self, features: Mapping[int, Tensor], step: int) -> Tensor:
        """The adversarial term of one batch; the step number seeds its draws, so that a resumed run draws the same."""
        assert self.adversary is not None
        return self.adversary.loss(features, seeded(self.seed, self.adversary.classes, "draw", step))

    def finish(self) -> Parts:
        """Freeze the task's parts. Retention `exact` copies the shared ones too; `live` lets them move on."""
        parts = self._all()
        exact = self.config.retention == "exact"
        shared = frozen_copy(parts.shared) if exact else parts.shared
        gate = parts.gate if self.gate is not None and not exact else frozen_copy(parts.gate)
        head = None if parts.head is None else frozen_copy(parts.head)
        finished = self._answering(self.form(shared, frozen_copy(parts.task), gate, self.scale, head))
        if self.adversary is not None:
            self.adversary.remember()
        self.task = self.own_gate = self.head = None
        return finished

    def moving(self) -> dict[str, nn.Module]:
        """The parts that move on under finished tasks, by their names in the store."""
        if self.config.retention == "exact" or self.config.experts == "task":
            return {}
        if self.config.experts == "shared":
            return {"lora": self.shared}
        return {"shared": self.shared} | ({} if self.gate is None else {"gate": self.gate})

    def export(self) -> dict[str, dict[str, Tensor]]:
        """What only further learning needs, by file of the store's training/ folder."""
        state: dict[str, dict[str, Tensor]] = {"shared": tensors(self.shared)}
        if self.gate is not None:
            state["gate"] = tensors(self.gate)
        if (adversary := self.adversary) is not None:
            layers = list(enumerate(adversary.layer_ids))
            state["discriminator"] = {f"layers.{i}.discriminator": adversary.rows[n] for n, i in layers}
            state["memory"] = {f"layers.{i}.mean": adversary.mean[n] for n, i in layers}
            state["memory"] |= {f"layers.{i}.variance": adversary.variance[n] for n, i in layers}
        return state

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `export`; KeyError or RuntimeError where the state is not of this configuration."""
        self.shared.load_state_dict(dict(state["shared"]))
        if self.gate is not None:
            self.gate.load_state_dict(dict(state["gate"]))
        if (adversary := self.adversary) is not None:
            ids = adversary.layer_ids
            rows = torch.stack([state["discriminator"][f"layers.{i}.discriminator"] for i in ids])
            memory = {name: [state["memory"][f"layers.{i}.{name}"] for i in ids] for name in ("mean", "variance")}
            adversary.restore(rows, torch.stack(memory["mean"]), torch.stack(memory["variance"]))
