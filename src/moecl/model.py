"""`MoECL`: a frozen base, and a bank of tasks that any row of any batch can be answered with."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from moecl._card import public_id
from moecl._sizes import EXPERT_MEMORY, parse_size
from moecl.backbone import (
    DTYPES,
    Backbone,
    dtype_name,
    load_backbone,
    resolve_device,
    resolve_precision,
    weights_sha256,
)
from moecl.bank import OURS, Bank, Entry, carried, check_same_base, find, fitting, settings_of, store_in
from moecl.config import Task
from moecl.errors import BaseError, ConfigError, StoreError, TaskError
from moecl.method_config import MoECLConfig
from moecl.nn.call import Call, Parts, no_autocast, run_with
from moecl.nn.forms import tensors, to_tensors
from moecl.nn.gated import GatedLearner
from moecl.nn.inject import Injected
from moecl.nn.lora import Geometry
from moecl.nn.moe_ffn import pack_bytes
from moecl.store import FOLDERS, LOCK, LOG, BaseInfo, Store, TaskRecord

__all__ = ["Entry", "MoECL", "MoECLOutput", "TaskNames"]

TaskNames = str | Sequence[str | None] | None


@dataclass
class MoECLOutput(ModelOutput):
    """`loss` []; `logits` [answer tokens, vocabulary] or [B, labels]; `features` layer -> [B, D] where asked for.

    `query` [B, D]: the mean embedding of each text, where the task's form reads it.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: dict[int, Tensor] | None = None
    query: Tensor | None = None


class MoECL(nn.Module, ModelHubMixin, library_name="moecl", tags=["continual-learning", "lora"]):
    """A causal language model that learns task after task. Make one with `attach` or `from_pretrained`.

    The task is an argument of each call: a name, one name (or None) a row, or None for the bare base.
    """

    _hub_mixin_config = {}  # noqa: RUF012 - set, or the mixin copies the whole base in order to describe it

    def __init__(self, backbone: Backbone, config: MoECLConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.base_id, self.tokenizer = backbone.id, backbone.tokenizer
        self.base = backbone.model
        self._before = self.base.training, {p for p in self.base.parameters() if p.requires_grad}
        self.base.eval()  # type: ignore[no-untyped-call]
        try:
            self.injected = Injected(self.base, config.adapt_layers)
        except BaseError:
            self.base.train(self._before[0])
            raise
        self.base.requires_grad_(False)
        self.bank = Bank(self.geometry, self.device, itemsize=pack_bytes(self.base.dtype, self.device))
        self.learner: GatedLearner | None = None
        self._left: Store | None = None  # its state for further learning is not taken up yet
        self._open: str | None = None
        self._steps = 0
        self._detached = False

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
        """Open a task: fresh trainable parts, the former task's frozen. Raises TaskError if the name is taken.

        `warm_start: nearest` is for `ContinualTrainer`, which has rows to choose by: here a task begins from zero.
        """
        if task.name in self.bank:
            raise TaskError(f"task {task.name!r} is there already; choose another name")
        if task.kind == "classification" and not task.labels:
            raise TaskError(f"task {task.name!r}: labels are needed; give Task(labels=[...])")
        self.check_fits(task)
        self._check_method()
        self.finish_task()
        self._take_up()
        if self.learner is None:
            self.learner = self._new_learner()
        parts = self.learner.begin(task.name, len(task.labels or ()) if task.head == "classifier" else 0)
        self.bank[task.name] = Entry(task, parts)
        self._open, self._steps = task.name, 0

    def check_fits(self, task: Task) -> None:
        """Raises ConfigError where the base cannot serve the task: too few positions, or no room for its head."""
        positions = getattr(self.base.config, "max_position_embeddings", None)
        if positions is not None and (task.max_length or 0) > positions:
            raise ConfigError(
                f"task {task.name!r}: max_length: {task.max_length} is more than the base's {positions} positions; "
                "lower it, or train.max_length"
            )
        width = self.base.get_output_embeddings().weight.shape[-1]  # type: ignore[no-untyped-call]
        if task.head == "classifier" and width != self.geometry.hidden_size:
            raise ConfigError(
                f"task {task.name!r}: head: classifier does not fit this base, whose last layer gives {width} numbers "
                f"and not {self.geometry.hidden_size}; use head: lm"
            )

    def _check_method(self) -> None:
        """Raises StoreError where another method has learned the tasks: what it keeps to learn on is its own."""
        if (store := self.bank.store) is None or not store.manifest.tasks:
            return
        if (method := store.manifest.tasks[-1].settings.get("method", OURS)) != OURS:
            raise StoreError(f"{store.path}: was learned by {method}; `moecl learn` goes on with that")

    def _new_learner(self) -> GatedLearner:
        return GatedLearner(self.geometry, self.config, self.seed).to(self.device)

    def finish_task(self) -> None:
        """Freeze the open task for good; nothing to do where none is open."""
        if self._open is not None and self.learner is not None:
            self.bank[self._open] = Entry(self.bank[self._open].task, self.learner.finish())
            self._open = None

    def optimizer_groups(self, lr: float) -> list[dict[str, Any]]:
        """What the open task trains, as a torch optimizer takes it: lora_A at `lora_A_lr` times `lr`, all else at `lr`.

        Raises TaskError where no task is open.
        """
        if self._open is None or self.learner is None:
            raise TaskError("no task is open, so there is nothing to train; call add_task first")
        rates = self.learner.rates()
        return [{"params": ps, "lr": lr * rates.get(name, 1.0)} for name, ps in self.learner.groups().items() if ps]

    def train(self, mode: bool = True) -> Self:
        """The base stays in eval mode: its own dropout never runs."""
        super().train(mode)
        self.base.eval()  # type: ignore[no-untyped-call]
        return self

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute adapted layers in backward; always non-reentrant."""
        self.injected.checkpoint(True)

    def gradient_checkpointing_disable(self) -> None:
        self.injected.checkpoint(False)

    # Running

    @no_autocast()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task: TaskNames = None,
        features: bool = False,
        prefix: Tensor | None = None,
        bank: Mapping[str, Entry] | None = None,
        **kwargs: Any,
    ) -> Any:
        """input_ids, attention_mask [B, T]; prefix [B, T, D]: these texts' `Injected.prefix`, which is then not run.

        `bank` is asked for the tasks in the place of the model's own. torch.autocast changes nothing: load the base in
        bfloat16 instead (`precision="bf16"`).

        Without labels: the base's own output, with all logits. With labels [B, T] (-100 where no loss is wanted): a
        `MoECLOutput` whose logits are those of the answer tokens alone. For tasks with a classifier head, labels are
        class ids [B] and logits [B, labels]. In train mode the loss of the open task is its whole objective.
        """
        given = kwargs["inputs_embeds"] if input_ids is None else input_ids  # (B, T, ...)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        call = self.call(task, len(given), self.bank if bank is None else bank)
        call.dropout = self.config.dropout if self.training else 0.0
        call.prefix = prefix
        adversary = self._adversary(task) if labels is not None else None
        call.attention_mask = given.new_ones(given.shape[:2]) if attention_mask is None else attention_mask
        if features or adversary is not None:
            call.features = {}
        heads = {parts.head is not None for parts in call.parts if parts is not None}
        if True in heads:
            output = self._classify(call, heads, inputs, labels)
        elif labels is not None:
            output = self._answer(call, inputs, labels)
        else:
            with run_with(call):
                return self.base(**inputs if prefix is None else {**inputs, "use_cache": False})
        if adversary is not None:
            self._steps += 1
            assert call.features is not None
            assert output.loss is not None
            output.loss = output.loss + adversary.loss(call.features, self._steps)
        return output

    def _adversary(self, task: TaskNames) -> GatedLearner | None:
        """Whose adversarial term belongs to a loss on `task`: it is trained with the open task's own batches alone."""
        names = {task} if task is None or isinstance(task, str) else set(task)
        trains = self.training and torch.is_grad_enabled() and self._open is not None and names == {self._open}
        return self.learner if trains and self.learner is not None and self.learner.adversary is not None else None

    def call(self, task: TaskNames, rows: int, bank: Mapping[str, Entry]) -> Call:
        """The call that runs `rows` rows as `task` says. Raises TaskError for an unknown task."""
        if task is None or isinstance(task, str):
            return self.call_with([None if task is None else find(bank, task).parts])
        if len(task) != rows:
            raise TaskError(f"task: {len(task)} names for {rows} rows; give one name, or one a row")
        found = {name: None if name is None else find(bank, name).parts for name in dict.fromkeys(task)}
        return self.call_with([found[name] for name in task])

    def call_with(self, rows: Sequence[Parts | None]) -> Call:
        """The call that runs each row with these parts; one for all rows where they are the same."""
        if self._detached:
            raise BaseError("base: it was detached from this model; attach it again with MoECL.attach")
        own = dict.fromkeys(rows)  # a store's parts are equal where they are of the same modules
        if len(own) == 1:
            return Call((rows[0],))
        place = {parts: number for number, parts in enumerate(own)}
        return Call(tuple(own), torch.tensor([place[parts] for parts in rows], device=self.device))

    def _answer(self, call: Call, inputs: Mapping[str, Any], labels: Tensor) -> MoECLOutput:
        """Next-token loss at the answer positions; nothing else reaches the language-model head."""
        wanted = labels[:, 1:] != -100
        call.answers = F.pad(wanted, (0, 1))  # position t predicts token t + 1
        if any(parts is not None and parts.reads_query for parts in call.parts) and call.attention_mask is not None:
            call.attention_mask = call.attention_mask * (labels == -100)  # a text is weighed by what is asked
        with run_with(call):
            logits = self.base(**{**inputs, "use_cache": False}).logits
        loss = F.cross_entropy(logits.float(), labels[:, 1:][wanted])
        return MoECLOutput(loss=loss, logits=logits, features=call.features, query=call.query)

    def _classify(
        self, call: Call, heads: Iterable[bool], inputs: Mapping[str, Any], labels: Tensor | None
    ) -> MoECLOutput:
        if set(heads) != {True} or len(call.parts) > 1:
            raise TaskError("task: rows of tasks with a classifier head need a batch of their own, one task each")
        parts = call.parts[0]
        assert parts is not None
        assert parts.head is not None
        with run_with(call):
            hidden = self.base.base_model(**{**inputs, "use_cache": False}).last_hidden_state  # (B, T, D)
        mask = inputs["attention_mask"]
        last = hidden[:, -1] if mask is None else hidden[torch.arange(len(hidden)), last_real(mask)]
        logits = parts.head(last.float())
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return MoECLOutput(loss=loss, logits=logits, features=call.features, query=call.query)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, task: TaskNames = None, **kwargs: Any) -> Any:
        """transformers' `generate` with rows answered as `task` says; beams and samples of a row keep its task."""
        call = self.call(task, len(input_ids), self.bank)
        call.attention_mask = kwargs.get("attention_mask", torch.ones_like(input_ids))
        with run_with(call):
            return self.base.generate(input_ids, **kwargs)  # type: ignore[operator]

    def detach(self) -> PreTrainedModel:
        """Give the base back as it was, bitwise. This model can still be saved, but no longer run."""
        self.injected.detach()
        self._detached = True
        mode, trainable = self._before
        for parameter in trainable:
            parameter.requires_grad_(True)
        self.base.train(mode)
        return self.base

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the bank along, whose frozen parts are no parameters of the model; the base alone changes its dtype."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        self.base._apply(fn)  # type: ignore[no-untyped-call]
        if self.learner is not None:
            self.learner._apply(moved)  # type: ignore[no-untyped-call]
        self.bank.apply(moved)
        return self

    # On disk

    def base_info(self) -> BaseInfo:
        return BaseInfo(
            id=self.base_id,
            sha256=weights_sha256(self.base),
            dtype=dtype_name(self.base),
            model_type=self.base.config.model_type,
        )

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, config: None = None, model_card_kwargs: dict[str, str] | None = None
    ) -> None:
        """Write a store to a new or empty folder: every task, and what further learning needs. Raises StoreError.

        Of a model that came out of a store all of it, as it was when it was loaded (versions, aliases, retired tasks,
        what the router knows), and what was learned since. The open task is stored as it is now, and stays open. The
        mixin's `config` is not used; `model_card_kwargs` is what `push_to_hub` gives.
        """
        address = (model_card_kwargs or {}).get("address")
        base_id = self.base_id if address is None else public_id(self.base_id)
        base = self.base_info() if self.bank.store is None else self.bank.store.manifest.base
        with Store.making(save_directory, base.model_copy(update={"id": base_id})) as store:
            self.bank.copy_into(store)
            held = [entry for entry in self.bank.values() if entry.held is not None]
            if held or not store.manifest.begun:
                self._take_up()
                self._commit(store, held)
            if address is not None:
                store.commit(training=carried(store), what="save")
            store.write_card(address=address)

    def _commit(self, store: Store, entries: Iterable[Entry]) -> None:
        """Add to a store tasks that are not in it yet, and the state for further learning."""
        settings = self.config.model_dump(exclude={"name"}) | {"seed": self.seed}

        def record(entry: Entry) -> tuple[TaskRecord, dict[str, dict[str, Tensor]]]:
            parts = entry.parts
            scale = getattr(parts, "scale", 1.0)
            kept = TaskRecord(task=entry.task, form=parts.form, settings={"scale": scale, **settings})
            return kept, to_tensors(parts)

        learner = self.learner
        if learner is not None and self._open is not None:
            learner = copy.deepcopy(learner)
            learner.finish()
        if learner is None:
            store.commit(map(record, entries), what="save")
            return
        kept = store.training()  # the router's among it, which knows nothing of the new tasks
        moved = {name: tensors(module) for name, module in learner.moving().items()}
        store.commit(map(record, entries), kept | learner.export(), moved, what="save")

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save to a repository of the hub; keyword arguments are those of huggingface_hub's mixin.

        Without what tells of this machine (the log of accounts and commands, the folder that a base lies in) and what
        `carried` leaves at home. Objects that the repository has and this model has not are deleted from it.
        """
        ignored = kwargs.pop("ignore_patterns", None) or []
        kwargs["ignore_patterns"] = [LOCK, LOG, *([ignored] if isinstance(ignored, str) else ignored)]
        kwargs.setdefault("delete_patterns", [f"{folder}/*" for folder in FOLDERS])
        return super().push_to_hub(repo_id, model_card_kwargs={"address": repo_id}, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        base: str | PreTrainedModel | None = None,
        device: str = "auto",
        expert_memory: int | str = EXPERT_MEMORY,
        **hub: Any,
    ) -> Self:
        """The model of a store, of a run's folder, or of a repository of the hub, in eval mode.

        `base` replaces the base's name that the store gives; `expert_memory` (bytes, or "2GB") bounds what stays in
        memory of the learned tasks' experts, which are loaded when they are used; `hub` is passed on to
        `huggingface_hub.snapshot_download` (revision, token, cache_dir ...). Raises StoreError; BaseError for another
        base than it was learned on.
        """
        memory = parse_size(expert_memory, "expert_memory")
        folder = str(pretrained_model_name_or_path)
        if not Path(folder).is_dir():
            try:
                folder = snapshot_download(folder, **hub)
            except (OSError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise StoreError(f"{folder}: no such folder, and not to be had from the hub ({reason})") from error
        store = Store.open(store_in(folder), readonly=True)
        return cls.from_store(store, base=base, device=device, expert_memory=memory)

    @classmethod
    def from_store(
        cls,
        store: Store,
        base: str | PreTrainedModel | None = None,
        device: str = "auto",
        expert_memory: int | str = EXPERT_MEMORY,
    ) -> Self:
        """The model of a store; its tasks are loaded when they are used, and further ones learned on from there.

        Raises StoreError at once for what can be seen without reading the experts, for the rest when it is read;
        BaseError for another base.
        """
        info = store.manifest.base
        config, seed = settings_of(store)
        precision = next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{info.dtype}"), "fp32")
        model = cls.attach(info.id if base is None else base, config, precision=precision, device=device, seed=seed)
        model.base_id = info.id
        check_same_base(store, model.base_info())
        model.load_tasks(store, expert_memory)
        model._left = store if store.manifest.training else None
        return model.eval()

    def load_tasks(self, store: Store, expert_memory: int | str = EXPERT_MEMORY) -> None:
        """Put a store's tasks into the bank. Raises StoreError."""
        self.bank.loaded.limit = parse_size(expert_memory, "expert_memory")
        self.bank.take(store)

    def _take_up(self) -> None:
        """The state for further learning of the store this model is from; with retention `live` tasks share it."""
        if (store := self._left) is None:
            return
        before, learner = store.manifest, self._new_learner()
        with fitting(f"{store.path}: its state for further learning"):
            learner.restore(store.training())
        if store.manifest != before:
            raise StoreError(f"{store.path}: was changed after this model was loaded; load it again to learn on")
        self.learner, self.bank.moving, self._left = learner, learner.moving(), None


def last_real(attention_mask: Tensor) -> Tensor:
    """[B]: the position of each row's last real token, whichever side is padded."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * attention_mask).argmax(dim=1)
