"""What moecl is measured against, over the same weights: PEFT's LoRA, the slow reference, the published way, the base.

Every side forms only the logits that are asked for, so that a comparison is one of adapters and not of heads.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moecl import MoECL, MoECLConfig, Task
from moecl.nn.call import Call, current_call
from moecl.nn.lora import Expert
from moecl.nn.moe_ffn import Gated, MoEFFN
from moecl.nn.reference import reference

PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
LABELS = ["love", "bad"]  # a token each in most vocabularies
STD = 0.02  # of weights that are to be something else than where they start

Forward = Callable[[Tensor], Tensor]


def twin(base: PreTrainedModel) -> PreTrainedModel:
    """A base of its own for one side, over the same weights."""
    shared = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    return copy.deepcopy(base, shared)


class AnswersOnly:
    """Lets the `wanted` positions [B, T] alone reach the head of `base`, as moecl does; all of them where None."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.wanted: Tensor | None = None
        base.get_output_embeddings().register_forward_pre_hook(self._keep)  # type: ignore[no-untyped-call]

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self.wanted is None else (args[0][self.wanted], *args[1:])


def answer_loss(model: nn.Module, head: AnswersOnly, batch: dict[str, Tensor]) -> Tensor:
    """moecl's loss, of a model that knows nothing of moecl. batch: input_ids, attention_mask, labels [B, T]."""
    labels = batch["labels"][:, 1:]
    wanted = labels != -100
    head.wanted = F.pad(wanted, (0, 1))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return F.cross_entropy(logits.float(), labels[wanted])


def peft_lora(base: PreTrainedModel, config: MoECLConfig, names: list[str] | None = None) -> Any:
    """`base` with PEFT's LoRA on the projections that moecl adapts: one adapter, or one a name."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=int(config.lora_alpha),
        lora_dropout=config.dropout,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    first, *others = names or ["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a name that transformers will drop
        model = get_peft_model(base, lora, adapter_name=first)
    for name in others:
        model.add_adapter(name, lora)
    return model


@torch.no_grad()
def stir(module: nn.Module, seed: int = 0, only: str = "") -> None:
    """Small random values for all parameters whose name holds `only`."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if only in name:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * STD)


def stir_parts(parts: Any, seed: int = 0) -> None:
    """A task that has moved from where it started."""
    for place, module in enumerate((parts.shared, parts.task, parts.gate)):
        stir(module, 3 * seed + place)


def labelled(name: str) -> Task:
    return Task(name=name, kind="classification", labels=LABELS)


def replace_ffns(model: MoECL, make: Callable[[MoEFFN], Forward]) -> MoECL:
    """Another way to compute the mixture in every adapted FFN."""
    for module in model.base.modules():
        if isinstance(forward := module.__dict__.get("forward"), MoEFFN):
            module.forward = make(forward)
    return model


def reference_ffn(of: MoEFFN) -> Forward:
    """Term by term, as `nn/reference.py`: six base GEMMs and more."""

    def forward(x: Tensor) -> Tensor:
        call, parts = under_way()
        mask = x.new_ones(x.shape[:2]) if call.attention_mask is None else call.attention_mask
        mixed = reference(x, mask, of.ffn, parts, of.layer)
        if call.features is not None:
            call.features[of.layer] = mixed.p
        return mixed.y

    return forward


def published_ffn(of: MoEFFN) -> Forward:
    """As the published code: gate and up once, then expert after expert the rest of the FFN, four base GEMMs."""

    def forward(x: Tensor) -> Tensor:
        call, parts = under_way()
        gate, up = of.ffn.project(x)  # (B, T, F)
        y_s, y_t = (expert_output(x, gate, up, of, expert, parts.scale) for expert in (parts.shared, parts.task))
        b = torch.softmax((x @ parts.gate.weight(of.layer).to(x.dtype).mT).float(), dim=-1).to(x.dtype)  # (B, T, 2)
        if call.features is not None:
            assert call.attention_mask is not None
            real = call.attention_mask.to(x.dtype)[..., None]
            call.features[of.layer] = (y_s * real).sum(dim=1) / real.sum(dim=1)
        return b[..., :1] * y_s + b[..., 1:] * y_t

    return forward


def expert_output(x: Tensor, gate: Tensor | None, up: Tensor, of: MoEFFN, expert: Expert, scale: float) -> Tensor:
    """y_e [B, T, D] from the base's gate and up [B, T, F]."""

    def delta(projection: str, seen: Tensor) -> Tensor:
        pair = expert.pair(of.layer, projection)
        return seen @ pair.lora_A.to(x.dtype).mT @ pair.lora_B.to(x.dtype).mT * scale

    own = None if gate is None else gate + delta("gate_proj", x)
    h = of.ffn.hidden(own, up + delta("up_proj", x))
    return of.ffn.down(h) + delta("down_proj", h)


def under_way() -> tuple[Call, Gated]:
    """The call of the model under way, and its one task's parts."""
    call = current_call()
    assert call is not None, "only under a task"
    [parts] = call.parts
    assert isinstance(parts, Gated), "only under a task"
    return call, parts
