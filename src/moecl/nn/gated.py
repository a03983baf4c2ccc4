"""What MoE-CL trains, from the first task to the last: https://arxiv.org/abs/2509.18133, eq. 3-10.

One shared expert and the adversary live as long as the model; a task expert, and a gate and a head of its own, are
made when a task begins. `finish` hands back the parts that answer for the task from then on.
"""

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moecl.config import MoECLConfig
from moecl.nn.discriminator import Adversary
from moecl.nn.lora import Expert, Gate, Geometry, freeze, load_expert, load_gate
from moecl.nn.moe_ffn import Gated

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
            Adversary(geometry, config.alpha, config.discriminator_memory == "gaussian") if config.alpha > 0 else None
        )
        self.task = self.own_gate = self.head = None

    @property
    def scale(self) -> float:
        return self.config.lora_alpha / self.config.rank

    def begin(self, name: str, labels: int = 0) -> Gated:
        """Fresh trainable parts for a task; `labels` > 0 gives it a classifier head."""
        assert self.task is None, "finish the task under way first"
        fresh = self.preview(name, labels)
        self.task, self.head = fresh.task, fresh.head
        self.own_gate = None if self.gate is not None else fresh.gate
        if self.adversary is not None:
            self.adversary.grow()
        self.requires_grad_(True)
        device = next(self.shared.parameters()).device
        self.to(device)
        return self.parts()

    def preview(self, name: str, labels: int = 0) -> Gated:
        """The parts a task has before its first step."""
        device = next(self.shared.parameters()).device
        task = Expert(self.geometry, self.config.rank).reset(seeded(self.seed, name, "task"))
        if self.config.warm_start == "shared":
            task.load_state_dict(self.shared.state_dict())
        gate = self.gate or Gate(self.geometry).reset(seeded(self.seed, name, "gate"), self.config.gate_std)
        head = new_head(labels, self.geometry.hidden_size, seeded(self.seed, name, "head")) if labels else None
        return Gated(self.shared, task.to(device), gate.to(device), self.scale, head.to(device) if head else None)

    def parts(self) -> Gated:
        gate = self.gate or self.own_gate
        assert self.task is not None, "no task under way"
        assert gate is not None
        return Gated(self.shared, self.task, gate, self.scale, self.head)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What the task under way trains: the experts' side, and the discriminator against it."""
        ours = [p for name, p in self.named_parameters() if not name.startswith("adversary.")]
        return {"experts": ours, "discriminator": [] if self.adversary is None else list(self.adversary.parameters())}

    def loss(self, features: Mapping[int, Tensor], step: int) -> Tensor:
        """The adversarial term of one batch; the step number seeds its draws, so that a resumed run draws the same."""
        assert self.adversary is not None
        return self.adversary.loss(features, seeded(self.seed, self.adversary.classes, "draw", step))

    def finish(self) -> Gated:
        """Freeze the task's parts. Retention `exact` copies the shared ones too; `live` lets them move on."""
        parts = self.parts()
        exact = self.config.retention == "exact"
        shared = frozen_copy(parts.shared) if exact else parts.shared
        gate = parts.gate if self.gate is not None and not exact else frozen_copy(parts.gate)
        head = None if parts.head is None else frozen_copy(parts.head)
        finished = Gated(shared, frozen_copy(parts.task), gate, self.scale, head)
        if self.adversary is not None:
            self.adversary.remember()
        self.task = self.own_gate = self.head = None
        return finished

    def export(self) -> dict[str, dict[str, Tensor]]:
        """What only further learning needs, by file of the store's training/ folder."""
        state: dict[str, dict[str, Tensor]] = {"shared": tensors(self.shared)}
        if self.gate is not None:
            state["gate"] = tensors(self.gate)
        if (adversary := self.adversary) is not None:
            layers = list(enumerate(adversary.layer_ids))
            weight = adversary.weight.detach()
            state["discriminator"] = {f"layers.{i}.discriminator": weight[n].cpu() for n, i in layers}
            state["memory"] = {f"layers.{i}.mean": adversary.mean[n].cpu() for n, i in layers}
            state["memory"] |= {f"layers.{i}.variance": adversary.variance[n].cpu() for n, i in layers}
        return state

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `export`; KeyError or RuntimeError where the state is not of this configuration."""
        flat = {f"shared.{name}": tensor for name, tensor in state["shared"].items()}
        if self.gate is not None:
            flat |= {f"gate.{name}": tensor for name, tensor in state["gate"].items()}
        if self.adversary is not None:
            ids = self.adversary.layer_ids
            flat["adversary.weight"] = torch.stack([state["discriminator"][f"layers.{i}.discriminator"] for i in ids])
            for name in ("mean", "variance"):
                flat[f"adversary.{name}"] = torch.stack([state["memory"][f"layers.{i}.{name}"] for i in ids])
            flat["adversary.running"] = torch.zeros_like(self.adversary.running)
            flat["adversary.running_weight"] = torch.zeros(())
        self.load_state_dict(flat)


def frozen_copy(module: Any) -> Any:
    return freeze(copy.deepcopy(module))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors as the store keeps them: on the CPU, no longer written to."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def to_tensors(parts: Gated) -> dict[str, dict[str, Tensor]]:
    """The objects of a gated task in the store, by part."""
    found = {"shared": tensors(parts.shared), "task": tensors(parts.task), "gate": tensors(parts.gate)}
    if parts.head is not None:
        found["head"] = {"head": parts.head.weight.detach().cpu().clone()}
    return found


def from_tensors(geometry: Geometry, scale: float, found: Mapping[str, Mapping[str, Tensor]]) -> Gated:
    """The inverse of `to_tensors`, frozen; RuntimeError where names or shapes are not this geometry's."""
    head = None
    if "head" in found:
        weight = found["head"]["head"]
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        head.load_state_dict({"weight": weight})
        freeze(head)
    return Gated(
        load_expert(geometry, found["shared"]),
        load_expert(geometry, found["task"]),
        load_gate(geometry, found["gate"]),
        scale,
        head,
    )
