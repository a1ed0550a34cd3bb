"""AdamW, with clipping and the guard against non-finite steps inside the update itself; and its learning rate."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from llama_acc.core.distributed.groups import Parallel, as_dtensor, is_sharded, local_part
from llama_acc.core.model.copies import ComputeCopies
from llama_acc.core.model.layers import Spec

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of the size of a parameter."""

_ALONE = Parallel()


class ClippedAdamW:
    """Fused AdamW whose one pass over the parameters also clips, and skips a step that is not finite.

    The gradients are divided by max(1, norm / clip) inside the fused kernel, and a non-finite norm or loss makes the
    kernel leave weights, moments and step count alone, all on the device: the host need not wait.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Mapping[str, Spec],
        parallel: Parallel = _ALONE,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip_grad_norm: float,
        copies: ComputeCopies | None = None,
    ) -> None:
        """Trains the model's parameters that require gradients; they have storage and values, and keep it.

        `specs`: what their layers say of them. `copies`: those that are computed with, made anew after each step.
        """
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._specs = specs
        # The fused kernel takes plain tensors: what is stored here of each parameter.
        self._stored = {name: local_part(p).tensor for name, p in self.named.items()}
        self._moments: dict[str, dict[str, Tensor]] = {}
        self._betas, self._eps, self._weight_decay, self._clip = betas, eps, weight_decay, clip_grad_norm
        self.copies = copies
        # In the norm, this rank counts its own part of a parameter, and a copy only where it is the first to have it.
        self._counted = [
            name
            for name, p in self.named.items()
            if (parallel.model_rank == 0 or specs[name].split is not None)
            and (parallel.data_rank == 0 or is_sharded(p))
        ]

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared L2 norm of all gradients, a float32 scalar: to be summed over all ranks."""
        gradients = [_local(gradient) for name in self._counted if (gradient := self.named[name].grad) is not None]
        return torch.nn.utils.get_total_norm(gradients, norm_type=2.0, foreach=True).square()

    @torch.no_grad()
    def step(self, lr: float, norm: Tensor, loss: Tensor) -> None:
        """One update from the parameters' gradients, which are then dropped; none where the loss or `norm`, the L2 norm
        of the gradients of all ranks together, is not finite.
        """
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        gradients = {name: _local(p.grad) for name, p in self.named.items() if p.grad is not None}
        for with_decay in (True, False):
            names = [name for name in gradients if self._specs[name].decays is with_decay]
            states = [self._state(name) for name in names]
            # The function that torch.optim.AdamW calls; the class would import the compiler, which takes a second.
            adamw(
                [self._stored[name] for name in names],
                [gradients[name] for name in names],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                # clip_grad_norm_'s factor: clip / (norm + 1e-6), at most 1. The kernel divides by it.
                grad_scale=((norm + 1e-6) / self._clip).clamp_(min=1.0),
                found_inf=(~finite).float(),
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=lr,
                weight_decay=self._weight_decay if with_decay else 0.0,
                eps=self._eps,
                maximize=False,
            )
        for parameter in self.named.values():
            parameter.grad = None
        if self.copies is not None:
            self.copies.refresh()

    def make_state(self) -> None:
        """Makes what the first step would make, where it is not there yet: the moments, all zero."""
        for name in self.named:
            self._state(name)

    def _state(self, name: str) -> dict[str, Tensor]:
        if name not in self._moments:
            stored = self._stored[name]
            moments = {key: torch.zeros_like(stored, memory_format=torch.preserve_format) for key in MOMENTS}
            self._moments[name] = {"step": torch.zeros((), dtype=torch.float32, device=stored.device), **moments}
        return self._moments[name]

    def state_tensors(self) -> list[tuple[str, str, Tensor]]:
        """What is kept for each parameter: ("step" | "exp_avg" | "exp_avg_sq", its name, the rows stored here)."""
        return [(key, name, value) for name, state in self._moments.items() for key, value in state.items()]

    def load_state(self, read: Callable[[str, Tensor], Tensor | None]) -> None:
        """Restores what `state_tensors` gave; `read` gets `KEY.NAME` and the parameter, and returns None if there is
        nothing, else the rows to be stored here."""
        for name, parameter in self.named.items():
            found = {key: read(f"{key}.{name}", parameter) for key in ("step", *MOMENTS)}
            self._moments[name] = {key: value for key, value in found.items() if value is not None}


def _local(gradient: Tensor) -> Tensor:
    dtensor = as_dtensor(gradient)
    return gradient if dtensor is None else dtensor.to_local()


def learning_rate(epoch: float, *, epochs: float, warmup_epochs: float, lr: float, min_lr: float) -> float:
    """Linear warm-up from 0 to `lr`, then half a cosine down to `min_lr` (LLaMA2-Accessory's schedule).

    `epoch` is passes over the data completed before this step, a fraction; so a warm-up's first step has rate 0.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = min(1.0, (epoch - warmup_epochs) / (epochs - warmup_epochs))
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
