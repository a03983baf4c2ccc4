"""Find the FFNs of a base, put a `MoEFFN` in the place of each one's forward, and give the base back.

Families differ only in what their projections are called, so one table of names serves all. Whatever matches the
table is run once against the original FFN and refused unless both agree bitwise.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from moecl.errors import BaseError
from moecl.nn.call import Call, current_call, run_with, token_shares
from moecl.nn.ffn import FFN
from moecl.nn.lora import GATED, UNGATED, Geometry
from moecl.nn.moe_ffn import MoEFFN
from moecl.nn.weights import Projections


@dataclass(frozen=True)
class Names:
    """What a family calls its projections; `block` is the FFN's name in a decoder layer, "" for the layer itself."""

    families: str
    up: str
    down: str
    activation: str
    gate: str | None = None
    fused: bool = False  # `up` holds gate and up, in this order
    block: str = "mlp"
    model_types: tuple[str, ...] = ()  # needed where the FFN cannot be run alone


TABLE = (
    Names(
        "Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, OLMo2, SmolLM3", "up_proj", "down_proj", "act_fn", "gate_proj"
    ),
    Names("Phi-3", "gate_up_proj", "down_proj", "activation_fn", fused=True),
    Names("GPT-2", "c_fc", "c_proj", "act"),
    Names("GPT-NeoX, Pythia", "dense_h_to_4h", "dense_4h_to_h", "act"),
    Names("Phi", "fc1", "fc2", "activation_fn"),
    Names("OPT", "fc1", "fc2", "activation_fn", block="", model_types=("opt",)),
)
SUPPORTED = "; ".join(names.families for names in TABLE)

Forward = Callable[..., Any]
HEAD_ROWS = 16384  # of the language-model head, in float32 at a time


class Injected:
    """A base with its FFNs replaced; `detach` undoes it. Only `forward` attributes change, no module, no weight."""

    def __init__(self, base: nn.Module, adapt_layers: int | str) -> None:
        check_base(base)
        layers = decoder_layers(base)
        count = len(layers) if adapt_layers == "all" else int(adapt_layers)
        if count > len(layers):
            raise BaseError(f"method.adapt_layers: {count} is more than the base's {len(layers)} layers; use all")
        self.base = base
        self.layers = {index: layers[index] for index in range(len(layers) - count, len(layers))}
        self.names = names = find_names(base, self.layers)
        ffns = {index: take_apart(layer, names) for index, layer in self.layers.items()}
        for index, layer in self.layers.items():
            check_ffn(layer, ffns[index], names, index)
        self.geometry = geometry(self.layers, names, len(layers))
        self._undo: list[Callable[[], None]] = []
        for index, layer in self.layers.items():
            self._inject(layer, ffns[index], names, index)
        self._hooks = [layers[0].register_forward_pre_hook(_note_batch, with_kwargs=True)]
        head = base.get_output_embeddings()  # type: ignore[operator]
        self._hooks.append(head.register_forward_pre_hook(_keep_answers))
        self._replace(head, partial(_read, head, head.forward))
        self._all, self._ends = layers, set[int]()
        for layer in layers[: self.below]:
            self._replace(layer, partial(_below, layer.forward))
        self._checkpointed = False

    @property
    def below(self) -> int:
        """How many layers lie below the first adapted one; with the embeddings they are the prefix."""
        return min(self.layers)

    def prefix(self, input_ids: Tensor) -> Tensor:
        """The prefix's output: [B, T] without padding -> [B, T, D]. Threads may call it at once."""
        return self.entering(self.below, input_ids)

    @torch.no_grad()
    def entering(self, layer: int, input_ids: Tensor) -> Tensor:
        """What enters a layer of the bare base: [B, T] without padding -> [B, T, D]. Threads may call it at once."""
        if layer not in self._ends:
            self._hooks.append(self._all[layer].register_forward_pre_hook(_reached, with_kwargs=True))
            self._ends.add(layer)  # last: another thread may rely on it at once, and a second hook does no harm
        try:
            with run_with(_Until((None,), layer=self._all[layer])):
                self.base.base_model(input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)  # type: ignore[operator]
        except _ReachedError as reached:
            return reached.hidden_states
        raise AssertionError(f"layer {layer} did not run")

    @torch.no_grad()
    def takes_prefix(self) -> bool:
        """Whether a forward above its prefix ends as the whole one does, bitwise: tried, not believed."""
        if not self.below:
            return False
        ids = torch.arange(3, 11, device=next(self.base.parameters()).device)[None]
        ends = []
        try:
            for prefix in (None, self.prefix(ids)):
                with run_with(Call((None,), prefix=prefix)):
                    ends.append(self.base.base_model(ids, use_cache=False).last_hidden_state)  # type: ignore[operator]
        except Exception:  # how a family that passes on more than hidden states fails is its own affair
            return False
        return torch.equal(*ends)

    def projections(self) -> Projections:
        """A trainable float32 copy of the adapted FFNs' projections."""
        return Projections(
            {index: linears(layer, self.names, self.geometry.projections) for index, layer in self.layers.items()}
        )

    @torch.no_grad()
    def queries(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[rows, D] float32: the mean embedding of each text's tokens."""
        embed = self.base.get_input_embeddings()  # type: ignore[operator]
        device = embed.weight.device
        return torch.stack([embed(torch.tensor(list(ids), device=device)).float().mean(dim=0) for ids in rows])

    def _inject(self, layer: nn.Module, ffn: FFN, names: Names, index: int) -> None:
        if names.block:
            block = getattr(layer, names.block)
            self._replace(block, MoEFFN(ffn, block.forward, index))
        else:  # the FFN is spelled out in the layer: the first projection does it all, the rest pass it on
            self._replace(getattr(layer, names.up), MoEFFN(ffn, ffn, index))
            self._replace(getattr(layer, names.activation), _identity)
            self._replace(getattr(layer, names.down), _identity)

    def _replace(self, module: nn.Module, forward: Forward) -> None:
        was = module.__dict__.get("forward")

        def undo() -> None:
            if was is None:
                del module.forward
            else:
                module.forward = was

        module.forward = forward
        self._undo.append(undo)

    def checkpoint(self, on: bool) -> None:
        """Recompute each adapted layer in backward instead of keeping its activations (non-reentrant).

        Ours and not transformers', which does it in train mode alone; the base is always in eval mode.
        """
        if on and not self._checkpointed:
            for layer in self.layers.values():
                self._replace(layer, partial(_checkpointed, layer.forward))
            self._checkpointed = True
        elif self._checkpointed and not on:
            for _ in self.layers:
                self._undo.pop()()
            self._checkpointed = False

    def detach(self) -> nn.Module:
        while self._undo:
            self._undo.pop()()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._checkpointed = [], False
        return self.base


def _checkpointed(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    call = current_call()
    if not torch.is_grad_enabled() or call is None:
        return forward(*args, **kwargs)
    contexts = lambda: (nullcontext(), run_with(call.replay()))  # noqa: E731
    # A KV cache would be filled once more by the recomputation; transformers drops it here too.
    args = tuple(None if isinstance(arg, Cache) else arg for arg in args)
    kwargs = {name: None if isinstance(arg, Cache) else arg for name, arg in kwargs.items()}
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@dataclass
class _Until(Call):
    """A call that ends where it reaches `layer`."""

    layer: nn.Module | None = None


class _ReachedError(Exception):
    """What enters that layer."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


def _reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = current_call()
    if isinstance(call, _Until) and call.layer is module:
        raise _ReachedError(args[0] if args else kwargs["hidden_states"])


def _below(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """A layer of the prefix: where the call brings the prefix's output along, that is the output of each."""
    call = current_call()
    if call is None or call.prefix is None:
        return forward(*args, **kwargs)
    assert not any(isinstance(arg, Cache) for arg in (*args, *kwargs.values())), "a KV cache needs every layer"
    return call.prefix


def _identity(hidden_states: Tensor) -> Tensor:
    return hidden_states


def _note_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (call := current_call()) is None:
        return
    hidden_states = args[0] if args else kwargs["hidden_states"]  # (B, T, D), the embeddings
    call.batch_size = hidden_states.shape[0]
    if call.query is None and any(parts is not None and parts.reads_query for parts in call.parts):
        call.query = (token_shares(call, hidden_states) @ hidden_states)[:, 0].detach()


def _keep_answers(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Only the answer positions reach the language-model head: (B, T, D) -> (answers, D)."""
    call = current_call()
    if call is None or call.answers is None:
        return None
    return (args[0][call.answers], *args[1:])


def _read(head: nn.Module, forward: Forward, hidden_states: Tensor) -> Tensor:
    """The logits of the tokens that the call reads: bfloat16 ones are equal for labels that are near each other."""
    call = current_call()
    if call is None or call.tokens is None:
        return cast(Tensor, forward(hidden_states))
    if type(head) is not nn.Linear or (head.weight.dtype == torch.float32 and isinstance(call.tokens, slice)):
        return cast(Tensor, forward(hidden_states)[..., call.tokens].float())
    weight, bias = head.weight[call.tokens], None if head.bias is None else head.bias[call.tokens].float()
    x = hidden_states.float()
    # A float32 copy of a whole head would be gigabytes.
    logits = [x @ some.float().mT for some in torch.split(weight, HEAD_ROWS)]
    return torch.cat(logits, dim=-1) if bias is None else torch.cat(logits, dim=-1) + bias


def check_base(base: nn.Module) -> None:
    """Refuse what the adapter cannot serve: a quantised base, one spread over devices, no causal LM."""
    quantisation = getattr(getattr(base, "config", None), "quantization_config", None)
    if getattr(base, "is_quantized", False) or quantisation is not None:
        raise BaseError("base: quantised weights are not supported yet; load the base in float32 or bfloat16")
    odd = {str(p.dtype) for p in base.parameters() if not p.dtype.is_floating_point}
    if odd:
        raise BaseError(f"base: weights of type {', '.join(sorted(odd))}; load the base in float32 or bfloat16")
    devices = sorted({str(parameter.device) for parameter in base.parameters()})
    if len(devices) > 1:
        raise BaseError(f"base: spread over {', '.join(devices)}; load it on one device (no device_map)")
    if getattr(base, "get_output_embeddings", lambda: None)() is None:
        raise BaseError(f"base: {type(base).__name__} is no causal language model; load it with AutoModelForCausalLM")
    if any(isinstance(module.__dict__.get("forward"), MoEFFN) for module in base.modules()):
        raise BaseError("base: it has an adapter already; detach that one first")


def decoder_layers(base: nn.Module) -> nn.ModuleList:
    """The base's decoder layers: the longest list of modules in its text model, for it may have another for images."""
    text_model = base.get_decoder()  # type: ignore[operator]
    lists = [module for module in text_model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise BaseError(f"base: found no list of decoder layers in {type(base).__name__}; supported: {SUPPORTED}")
    return max(lists, key=len)


def find_names(base: nn.Module, layers: dict[int, nn.Module]) -> Names:
    """The entry of the table that fits every layer."""
    model_type = getattr(getattr(base, "config", None), "model_type", "")
    possible = [names for names in TABLE if not names.model_types or model_type in names.model_types]
    for names in possible:
        if all(_fits(layer, names) for layer in layers.values()):
            return names
    index = next((i for i, layer in layers.items() if not any(_fits(layer, names) for names in possible)), min(layers))
    found = ", ".join(f"{name}: {type(child).__name__}" for name, child in layers[index].named_children())
    raise BaseError(f"base: no FFN we know in {type(base).__name__}'s layer {index} ({found}); supported: {SUPPORTED}")


def _fits(layer: nn.Module, names: Names) -> bool:
    block = getattr(layer, names.block, None) if names.block else layer
    wanted = [name for name in (names.up, names.down, names.activation, names.gate) if name]
    return all(hasattr(block, name) for name in wanted)


def take_apart(layer: nn.Module, names: Names) -> FFN:
    block = getattr(layer, names.block) if names.block else layer
    modules = [getattr(block, name) for name in (names.gate, names.up, names.down) if name]
    *first, down = [module.forward for module in modules]
    activation: Forward = getattr(block, names.activation).forward
    matrices = (
        partial(_matrices, modules, names.fused) if all(type(m) in (nn.Linear, Conv1D) for m in modules) else None
    )
    if names.fused:
        return FFN(lambda x: first[0](x).chunk(2, dim=-1), activation, down, GATED, True, matrices)
    if names.gate is None:
        return FFN(lambda x: (None, first[0](x)), activation, down, UNGATED, False, matrices)
    return FFN(lambda x: (first[0](x), first[1](x)), activation, down, GATED, False, matrices)


def linears(layer: nn.Module, names: Names, projections: Sequence[str]) -> dict[str, nn.Module]:
    """Copies of an FFN's projections as float32 nn.Linear, by our names."""
    block = getattr(layer, names.block) if names.block else layer
    found: list[tuple[Tensor, Tensor | None]] = []
    for module in (getattr(block, name) for name in (names.gate, names.up, names.down) if name):
        weight, bias = cast(Tensor, module.weight), module.bias
        weight = weight if isinstance(module, nn.Linear) else weight.mT
        halves = 2 if names.fused and len(found) == 0 else 1
        biases = [None] * halves if bias is None else bias.chunk(halves)
        found += zip(weight.chunk(halves), biases, strict=True)
    copies: dict[str, nn.Module] = {}
    for name, (weight, bias) in zip(projections, found, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        copies[name] = linear
    return copies


def _matrices(modules: Sequence[nn.Module], fused: bool) -> tuple[Tensor, ...]:
    """Weights as [out, in], looked up at each call: a module's weight may be moved or cast."""
    weights = [cast(Tensor, module.weight) for module in modules]
    first = [
        weight if isinstance(module, nn.Linear) else weight.mT for module, weight in zip(modules, weights, strict=True)
    ]
    return (*first[0].chunk(2), first[1]) if fused else tuple(first)


@torch.no_grad()
def check_ffn(layer: nn.Module, ffn: FFN, names: Names, index: int) -> None:
    """The FFN taken apart must compute what the original computes, bitwise."""
    if not names.block:
        return
    block = getattr(layer, names.block)
    weight = next(block.parameters())
    x = torch.linspace(-1, 1, _widths(layer, names)[0], dtype=weight.dtype, device=weight.device)[None, None]
    if not torch.equal(block(x), ffn(x)):
        raise BaseError(
            f"base: the FFN of layer {index} ({type(block).__name__}) does more than its projections and activation; "
            f"supported: {SUPPORTED}"
        )


def _widths(layer: nn.Module, names: Names) -> tuple[int, int]:
    """(D, F). Linear keeps [out, in], GPT-2's Conv1D [in, out]."""
    weight = getattr(getattr(layer, names.block) if names.block else layer, names.down)
    shape = tuple(weight.weight.shape)
    return shape if isinstance(weight, nn.Linear) else (shape[1], shape[0])


def geometry(layers: dict[int, nn.Module], names: Names, num_layers: int) -> Geometry:
    widths = [_widths(layer, names) for layer in layers.values()]
    gated = names.gate is not None or names.fused
    return Geometry(tuple(layers), widths[0][0], tuple(wide for _, wide in widths), gated, num_layers)
