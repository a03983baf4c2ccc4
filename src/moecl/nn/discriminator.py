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

MAX_DRAWN = 32  # old tasks that a new one is told apart from, so that a step costs the same at task 1000
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

    Call `grow` when a task begins, `loss` at each step and `remember` when the task is finished. In between only the
    rows of the task under way and of at most MAX_DRAWN old ones are in use: they alone are trained, told apart and in
    the state dict, which is what a step changes. All rows and the whole memory stay on the CPU.
    """

    rows: Tensor  # [L, N, D] of every task; those in use are put back by `remember`
    mean: Tensor  # [L, M, D], finished tasks
    variance: Tensor  # [L, M, D]
    active: Tensor  # [K]: the tasks in use, in order, the newest last
    weight: nn.Parameter  # [L, K, D]: their rows
    moments: Tensor  # [2, L, K - 1, D]: mean and variance of the old ones among them
    running: Tensor  # [2, L, D]: decayed first and second moments of the current task's features
    running_weight: Tensor  # []

    def __init__(self, geometry: Geometry, alpha: float, memory: bool) -> None:
        super().__init__()
        self.layer_ids, self.alpha, self.memory = geometry.layers, alpha, memory
        layers, width = len(geometry.layers), geometry.hidden_size
        self.rows, self.mean, self.variance = (torch.zeros(layers, 0, width) for _ in range(3))
        self.weight = nn.Parameter(torch.zeros(layers, 0, width))
        self.register_buffer("active", torch.zeros(0, dtype=torch.long))
        self.register_buffer("moments", torch.zeros(2, layers, 0, width), persistent=False)
        self.register_buffer("running", torch.zeros(2, layers, width))
        self.register_buffer("running_weight", torch.zeros(()))
        self.accuracy: Tensor | None = None  # of the last step's real rows, for the log
        self.real_loss: Tensor | None = None  # their L_GAN, likewise

    @property
    def classes(self) -> int:
        return self.rows.shape[1]

    def grow(self, generator: torch.Generator) -> None:
        """One more class, its row 0; choose the old ones it is told apart from; forget the running moments."""
        self._put_back()
        layers, old, width = self.rows.shape
        self.rows = torch.cat([self.rows, self.rows.new_zeros(layers, 1, width)], dim=1)
        chosen = torch.arange(old)
        if old > MAX_DRAWN:
            chosen = torch.randperm(old, generator=generator)[:MAX_DRAWN].sort().values
        self._use(torch.cat([chosen, torch.tensor([old])]))
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
        logits = gradient_reversal(p, self.alpha) @ self.weight.mT  # (L, B, K)
        newest = torch.full(logits.shape[:2], len(self.active) - 1, device=p.device)
        self.accuracy = (logits.detach().argmax(-1) == newest).float().mean()
        total = F.cross_entropy(logits.flatten(0, 1), newest.flatten())
        self.real_loss = total.detach()
        if self.memory and self.moments.shape[2]:
            drawn, tasks = self.draw(p.shape[1], generator)
            guesses = drawn @ self.weight.mT
            total = total + F.cross_entropy(guesses.flatten(0, 1), tasks.expand(len(drawn), -1).flatten())
        return total

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` pseudo-features of the old tasks in use: ([L, count, D], their places in `active` [count])."""
        mean, variance = self.moments
        chosen = torch.randperm(mean.shape[1], generator=generator)
        tasks = chosen.repeat(-(-count // len(chosen)))[:count].to(mean.device)
        noise = torch.randn(mean.shape[0], count, mean.shape[2], generator=generator)
        return mean[:, tasks] + variance[:, tasks].sqrt() * noise.to(mean.device), tasks

    def remember(self) -> None:
        """Put the rows in use back, and keep the current task's moments as those of a finished task."""
        self._put_back()
        self._use(torch.zeros(0, dtype=torch.long))
        first, second = (self.running / self.running_weight.clamp_min(1e-12)).to(self.mean)
        self.mean = torch.cat([self.mean, first[:, None]], dim=1)
        self.variance = torch.cat([self.variance, (second - first.square()).clamp_min(0)[:, None]], dim=1)

    def restore(self, rows: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Take up what was kept between two tasks: [L, N, D] each. Raises RuntimeError for another shape."""
        layers, _, width = self.rows.shape
        if not rows.shape == mean.shape == variance.shape == (layers, rows.shape[1], width):
            shapes = [list(one.shape) for one in (rows, mean, variance)]
            raise RuntimeError(f"size mismatch for the discriminator: {shapes}, not [{layers}, tasks, {width}]")
        self.rows, self.mean, self.variance = rows, mean, variance

    def _use(self, active: Tensor) -> None:
        old = active[:-1]
        old = old[old < self.mean.shape[1]]
        device = self.weight.device
        self.active = active.to(device)
        self.weight = nn.Parameter(self.rows[:, active].to(self.weight))
        self.moments = torch.stack([self.mean[:, old], self.variance[:, old]]).to(device)

    def _put_back(self) -> None:
        self.rows[:, self.active.cpu()] = self.weight.detach().to(self.rows)

    def _track(self, p: Tensor) -> None:
        moments = torch.stack([p.mean(dim=1), p.square().mean(dim=1)])  # (2, L, D)
        self.running.lerp_(moments, 1 - DECAY)
        self.running_weight.lerp_(self.running_weight.new_ones(()), 1 - DECAY)
