"""Models with tiny tasks whose parts are far from where they start."""

import torch

from moecl.config import MoECLConfig, Task
from moecl.model import MoECL
from tiny import tiny_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def task(name: str = "a", head: str | None = None, labels: tuple[str, ...] = ("good", "bad")) -> Task:
    return Task(name=name, kind="classification", labels=labels, head=head)


def stir(model: MoECL, seed: int = 0) -> None:
    """Give everything that is trained a value far from where it starts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.learner.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)


def learned(base=None, names: str = "ab", **settings) -> MoECL:
    """A model with finished tasks that differ much."""
    # a scale of 4, for which the tolerances were set: rounding grows with it
    model = MoECL.attach(base or tiny_model(), MoECLConfig(**{"rank": 4, "lora_alpha": 16, **settings}))
    for seed, name in enumerate(names):
        model.add_task(task(name))
        stir(model, seed)
    model.finish_task()
    return model.eval()


def labelled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The last two real tokens of each row are its answer."""
    mask = batch["attention_mask"]
    from_the_end = mask.flip(1).cumsum(1).flip(1) * mask
    return batch | {"labels": batch["input_ids"].where((from_the_end > 0) & (from_the_end <= 2), -100)}


def rows_of(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {name: tensor[row : row + 1] for name, tensor in batch.items()}
