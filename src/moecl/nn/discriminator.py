"""The task-aware discriminator and its adversary's memory: MoE-CL, https://arxiv.org/abs/2509.18133, eq. 5-6, 10.

Per layer l a linear discriminator guesses the task from p_l [B, D], the shared expert's mean output:

    L_GAN = mean over rows and layers of cross entropy(D_l p_l, task)

The discriminator minimises L_GAN and the experts minimise L_SFT - alpha L_GAN; one `backward` does both, since the
features pass through `gradient_reversal`, the only place where a sign is turned.

Rows of old tasks are gone, so a discriminator that saw the current task alone would learn a constant. What it keeps
instead is the mean and variance of p_l of each finished task, and draws pseudo-features from them.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moecl.nn.lora import Geometry

MAX_DRAWN = 32  # old tasks drawn a step, so that a step costs the same at task 1000
DECAY = 0.9  # of the running moments: a window of about ten batches


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, alpha: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.alpha = alpha
        return features.view_as(features)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return -ctx.alpha * grad, None


def gradient_reversal(features: Tensor, alpha: float) -> Tensor:
    """The identity forward; backward the gradient times -alpha (https://arxiv.org/abs/1505.07818, eq. 12)."""
    return _Reverse.apply(features, alpha)  # type: ignore[no-untyped-call,no-any-return]


class Adversary(nn.Module):
    """A discriminator per layer, [N, D] with a row a task, and the Gaussian memory of finished tasks.

    Call `grow` when a task begins, `loss` at each step and `remember` when the task is finished.
    """

    weight: Tensor  # [L, N, D]
    mean: Tensor  # [L, M, D], finished tasks
    variance: Tensor  # [L, M, D]
    running: Tensor  # [2, L, D]: decayed first and second moments of the current task's features
    running_weight: Tensor  # []

    def __init__(self, geometry: Geometry, alpha: float, memory: bool) -> None:
        super().__init__()
        self.layer_ids, self.alpha, self.memory = geometry.layers, alpha, memory
        layers, width = len(geometry.layers), geometry.hidden_size
        self.weight = nn.Parameter(torch.zeros(layers, 0, width))
        self.register_buffer("mean", torch.zeros(layers, 0, width))
        self.register_buffer("variance", torch.zeros(layers, 0, width))
        self.register_buffer("running", torch.zeros(2, layers, width))
        self.register_buffer("running_weight", torch.zeros(()))
        self.accuracy: Tensor | None = None  # of the last step's real rows, for the log

    @property
    def classes(self) -> int:
        return self.weight.shape[1]

    def grow(self) -> None:
        """One more class, its row 0; forget the running moments."""
        layers, _, width = self.weight.shape
        row = self.weight.new_zeros(layers, 1, width)
        self.weight = nn.Parameter(torch.cat([self.weight.detach(), row], dim=1))
        self.running.zero_()
        self.running_weight.zero_()

    def loss(self, features: Mapping[int, Tensor], generator: torch.Generator) -> Tensor:
        """L_GAN of the newest task's batch, plus that of as many pseudo-rows of old tasks; 0 while there is one class.

        features: layer -> p [B, D]. The pseudo-rows are constants, so only the discriminator learns from them.
        """
        p = torch.stack([features[layer] for layer in self.layer_ids]).float()  # (L, B, D)
        self._track(p.detach())
        if self.classes < 2:
            return p.new_zeros(())
        logits = gradient_reversal(p, self.alpha) @ self.weight.mT  # (L, B, N)
        newest = torch.full(logits.shape[:2], self.classes - 1, device=p.device)
        self.accuracy = (logits.detach().argmax(-1) == newest).float().mean()
        total = F.cross_entropy(logits.flatten(0, 1), newest.flatten())
        if self.memory and self.mean.shape[1]:
            drawn, tasks = self.draw(p.shape[1], generator)
            guesses = drawn @ self.weight.mT
            total = total + F.cross_entropy(guesses.flatten(0, 1), tasks.expand(len(drawn), -1).flatten())
        return total

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` pseudo-features of at most MAX_DRAWN finished tasks: ([L, count, D], task ids [count])."""
        known = self.mean.shape[1]
        chosen = torch.randperm(known, generator=generator)[:MAX_DRAWN]
        tasks = chosen.repeat(-(-count // len(chosen)))[:count].to(self.mean.device)
        noise = torch.randn(self.mean.shape[0], count, self.mean.shape[2], generator=generator)
        return self.mean[:, tasks] + self.variance[:, tasks].sqrt() * noise.to(self.mean.device), tasks

    def remember(self) -> None:
        """Keep the current task's moments as those of a finished task."""
        first, second = self.running / self.running_weight.clamp_min(1e-12)
        self.mean = torch.cat([self.mean, first[:, None]], dim=1)
        self.variance = torch.cat([self.variance, (second - first.square()).clamp_min(0)[:, None]], dim=1)

    def _track(self, p: Tensor) -> None:
        moments = torch.stack([p.mean(dim=1), p.square().mean(dim=1)])  # (2, L, D)
        self.running.lerp_(moments, 1 - DECAY)
        self.running_weight.lerp_(self.running_weight.new_ones(()), 1 - DECAY)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """Take the stored number of classes and finished tasks, which the fresh module cannot know."""
        for name in ("mean", "variance"):
            if (stored := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.zeros_like(stored, device=self.mean.device))
        if (stored := state_dict.get(prefix + "weight")) is not None and stored.shape != self.weight.shape:
            self.weight = nn.Parameter(torch.zeros_like(stored, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
