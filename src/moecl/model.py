"""`MoECL`: a frozen base, and a bank of tasks that any row of any batch can be answered with."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from moecl.backbone import Backbone, dtype_name, load_backbone, resolve_device, resolve_precision, weights_sha256
from moecl.config import MoECLConfig, Task
from moecl.errors import BaseError, StoreError, TaskError, near
from moecl.nn.gated import GatedLearner, from_tensors, to_tensors
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry
from moecl.nn.moe_ffn import Call, Gated, run_with
from moecl.store import BaseInfo, Store, TaskRecord

TaskNames = str | Sequence[str | None] | None


@dataclass(frozen=True)
class Entry:
    """A task in the bank, and what answers for it."""

    task: Task
    parts: Gated


@dataclass
class MoECLOutput(ModelOutput):
    """`loss` []; `logits` [answer tokens, vocabulary] or [B, labels]; `features` layer -> [B, D] where asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: dict[int, Tensor] | None = None


class MoECL(nn.Module, ModelHubMixin, library_name="moecl", tags=["continual-learning", "lora"]):
    """A causal language model that learns task after task. Make one with `attach` or `from_pretrained`.

    The task is an argument of each call: a name, one name (or None) a row, or None for the bare base.
    """

    def __init__(self, backbone: Backbone, config: MoECLConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.base_id, self.tokenizer = backbone.id, backbone.tokenizer
        self.base: PreTrainedModel = backbone.model.requires_grad_(False).eval()
        self.injected = Injected(self.base, config.adapt_layers)
        self.bank: dict[str, Entry] = {}
        self.learner: GatedLearner | None = None
        self._open: str | None = None
        self._steps = 0

    @classmethod
    def attach(
        cls,
        base: str | PreTrainedModel,
        config: MoECLConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        precision: str = "auto",
        device: str = "auto",
        seed: int = 0,
    ) -> Self:
        """Put the adapter into `base`: a loaded causal LM, or the name of one (asset, hub id, folder).

        A loaded base keeps its device and dtype. Raises BaseError where its FFNs are not supported.
        """
        if isinstance(base, str):
            device = resolve_device(device)
            backbone = load_backbone(base, resolve_precision(precision, device)[0], device)
        else:
            backbone = Backbone(base, tokenizer, base.config.name_or_path or type(base).__name__)
        return cls(backbone, config or MoECLConfig(), seed)

    @property
    def geometry(self) -> Geometry:
        return self.injected.geometry

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    # Learning

    def add_task(self, task: Task) -> None:
        """Open a task: fresh trainable parts, the former task's frozen. Raises TaskError if the name is taken."""
        if task.name in self.bank:
            raise TaskError(f"task {task.name!r} is there already; choose another name")
        if task.kind == "classification" and not task.labels:
            raise TaskError(f"task {task.name!r}: labels are needed; give Task(labels=[...])")
        self.finish_task()
        if self.learner is None:
            self.learner = GatedLearner(self.geometry, self.config, self.seed).to(self.device)
        parts = self.learner.begin(task.name, len(task.labels or ()) if task.head == "classifier" else 0)
        self.bank[task.name] = Entry(task, parts)
        self._open, self._steps = task.name, 0

    def finish_task(self) -> None:
        """Freeze the open task for good; nothing to do where none is open."""
        if self._open is not None and self.learner is not None:
            entry = self.bank[self._open]
            self.bank[self._open] = replace(entry, parts=self.learner.finish())
            self._open = None

    def train(self, mode: bool = True) -> Self:
        """The base stays in eval mode: its own dropout never runs."""
        super().train(mode)
        self.base.eval()
        return self

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute adapted layers in backward; always non-reentrant."""
        self.injected.checkpoint(True)

    def gradient_checkpointing_disable(self) -> None:
        self.injected.checkpoint(False)

    # Running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task: TaskNames = None,
        features: bool = False,
        **kwargs: Any,
    ) -> Any:
        """input_ids, attention_mask [B, T].

        Without labels: the base's own output, with all logits. With labels [B, T] (-100 where no loss is wanted): a
        `MoECLOutput` whose logits are those of the answer tokens alone. For tasks with a classifier head, labels are
        class ids [B] and logits [B, labels].
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        rows = len(next(value for value in inputs.values() if value is not None))
        call = self.call(task, rows, self.bank)
        wanted = labels is not None and self.training and self._open is not None and task == self._open
        if features or (wanted and self.learner is not None and self.learner.adversary is not None):
            call.features = {}
            call.attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # type: ignore[arg-type]
        call.dropout = self.config.dropout if self.training and labels is not None else 0.0
        heads = {parts.head is not None for parts in call.parts if parts is not None}
        if True in heads:
            output = self._classify(call, heads, inputs, labels)
        elif labels is not None:
            output = self._answer(call, inputs, labels)
        else:
            with run_with(call):
                return self.base(**inputs)
        if wanted and call.features:
            assert self.learner is not None and output.loss is not None
            self._steps += 1
            output.loss = output.loss + self.learner.loss(call.features, self._steps)
        return output

    def call(self, task: TaskNames, rows: int, bank: Mapping[str, Entry]) -> Call:
        """The call that runs `rows` rows as `task` says. Raises TaskError for an unknown task."""
        if task is None or isinstance(task, str):
            return Call((None if task is None else find(bank, task).parts,))
        if len(task) != rows:
            raise TaskError(f"task: {len(task)} names for {rows} rows; give one name, or one a row")
        names = list(dict.fromkeys(task))
        parts = tuple(None if name is None else find(bank, name).parts for name in names)
        if len(names) == 1:
            return Call(parts)
        return Call(parts, torch.tensor([names.index(name) for name in task], device=self.device))

    def _answer(self, call: Call, inputs: Mapping[str, Any], labels: Tensor) -> MoECLOutput:
        """Next-token loss at the answer positions; nothing else reaches the language-model head."""
        wanted = labels[:, 1:] != -100
        call.answers = F.pad(wanted, (0, 1))  # position t predicts token t + 1
        with run_with(call):
            logits = self.base(**inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.float(), labels[:, 1:][wanted])
        return MoECLOutput(loss=loss, logits=logits, features=call.features)

    def _classify(
        self, call: Call, heads: Iterable[bool], inputs: Mapping[str, Any], labels: Tensor | None
    ) -> MoECLOutput:
        if set(heads) != {True} or len(call.parts) > 1:
            raise TaskError("task: rows of tasks with a classifier head need a batch of their own, one task each")
        parts = call.parts[0]
        assert parts is not None and parts.head is not None
        with run_with(call):
            hidden = self.base.base_model(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
        mask = inputs["attention_mask"]
        last = hidden[:, -1] if mask is None else hidden[torch.arange(len(hidden)), last_real(mask)]
        logits = parts.head(last.float())
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return MoECLOutput(loss=loss, logits=logits, features=call.features)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, task: TaskNames = None, **kwargs: Any) -> Any:
        """transformers' `generate` with rows answered as `task` says; beams and samples of a row keep its task."""
        with run_with(self.call(task, len(input_ids), self.bank)):
            return self.base.generate(input_ids, **kwargs)

    def detach(self) -> PreTrainedModel:
        """Give the base back as it was, bitwise."""
        self.injected.detach()
        return self.base

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the bank along: its frozen parts are no parameters of the model."""
        super()._apply(fn, recurse)
        for entry in self.bank.values():
            for module in (entry.parts.shared, entry.parts.task, entry.parts.gate, entry.parts.head):
                if module is not None:
                    module._apply(fn)
        return self

    # On disk

    def base_info(self) -> BaseInfo:
        return BaseInfo(
            id=self.base_id,
            sha256=weights_sha256(self.base),
            dtype=dtype_name(self.base),
            model_type=self.base.config.model_type,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        """A new store with every task, and what further learning needs."""
        store = Store.create(save_directory, self.base_info())
        settings = {"retention": self.config.retention, "adapt_layers": self.config.adapt_layers}
        records = [
            (TaskRecord(task=entry.task, form="gated", settings={"scale": entry.parts.scale, **settings}),
             to_tensors(entry.parts))
            for entry in self.bank.values()
        ]  # fmt: skip
        store.commit(records, training=None if self.learner is None else self.learner.export())
        store.write_card()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:  # type: ignore[override]
        """Write a store to a new or empty folder. Raises StoreError."""
        self._save_pretrained(Path(save_directory))
        return None

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        base: str | PreTrainedModel | None = None,
        precision: str | None = None,
        device: str = "auto",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> Self:
        if Path(model_id).is_dir():
            folder = model_id
        else:
            folder = snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        return cls.from_store(open_store(folder), base=base, device=device)

    @classmethod
    def from_store(cls, store: Store, base: str | PreTrainedModel | None = None, device: str = "auto") -> Self:
        """The model of a store, every task loaded and checked. Raises StoreError, BaseError for another base."""
        manifest = store.manifest
        precision = "bf16" if manifest.base.dtype == "bfloat16" else "fp32"
        adapt = {str(record.settings.get("adapt_layers", "all")) for record in store.tasks()} or {"all"}
        layers = adapt.pop()
        config = MoECLConfig(adapt_layers=layers if layers == "all" else int(layers))
        model = cls.attach(manifest.base.id if base is None else base, config, precision=precision, device=device)
        model.base_id = manifest.base.id
        found = weights_sha256(model.base)
        if found != manifest.base.sha256:
            raise BaseError(
                f"{store.path}: learned on base {manifest.base.id} with sha256 {manifest.base.sha256[:12]}..., "
                f"this base has {found[:12]}...; load the base it was learned on"
            )
        model.load_tasks(store)
        return model

    def load_tasks(self, store: Store) -> None:
        """Put a store's tasks into the bank; objects that tasks share are loaded once."""
        objects: dict[str, dict[str, Tensor]] = {}
        for record in store.tasks():
            for digest in record.parts.values():
                if digest not in objects:
                    objects[digest] = store.read(digest)
            try:
                found = {part: objects[digest] for part, digest in record.parts.items()}
                parts = from_tensors(self.geometry, float(record.settings["scale"]), found)  # type: ignore[arg-type]
            except (RuntimeError, KeyError) as error:
                raise StoreError(
                    f"{store.path}: task {record.name!r} does not fit the base ({str(error).splitlines()[0]}); "
                    "is it another model's? restore the store from a copy"
                ) from error
            self.bank[record.name] = Entry(record.task, moved(parts, self.device))


def find(bank: Mapping[str, Entry], name: str) -> Entry:
    if (entry := bank.get(name)) is None:
        known = ", ".join(bank) or "none yet"
        raise TaskError(f"no task {name!r}; the tasks are: {known}{near(name, list(bank))}")
    return entry


def moved(parts: Gated, device: torch.device) -> Gated:
    for module in (parts.shared, parts.task, parts.gate, parts.head):
        if module is not None:
            module.to(device)
    return parts


def last_real(attention_mask: Tensor) -> Tensor:
    """[B]: the position of each row's last real token, whichever side is padded."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * attention_mask).argmax(dim=1)


def open_store(folder: str | Path) -> Store:
    """The store at `folder`, or of the run at `folder`."""
    inside = Path(folder) / "store"
    return Store.open(inside if Store.exists(inside) and not Store.exists(folder) else folder, readonly=True)
