"""AdamW, with clipping and the guard against non-finite steps inside the update itself; and its learning rate."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from llama_acc.core.distributed.groups import Parallel, as_dtensor, is_sharded, local_part
from llama_acc.core.model.layers import Spec

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of the size of a parameter."""

_ALONE = Parallel()


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter: on all but biases and norm weights (LLaMA2-Accessory's rule)."""
    return not name.endswith((".bias", "norm.weight"))


class ClippedAdamW:
    """Fused AdamW whose one pass over the parameters also clips, and skips a step that is not finite.

    The gradients are divided by max(1, norm / clip) inside the fused kernel, and a non-finite norm or loss makes the
    kernel leave weights, moments and step count alone, all on the device: the host need not wait.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel: Parallel = _ALONE,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip_grad_norm: float,
    ) -> None:
        """Trains the model's parameters that require gradients; they have storage, and keep it."""
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # The fused kernel takes plain tensors: what is stored here of a parameter, as a parameter of its own.
        self._stored = {
            name: p if as_dtensor(p) is None else nn.Parameter(local_part(p).tensor) for name, p in self.named.items()
        }
        # In the norm, this rank counts its own part of a parameter, and a copy only where it is the first to have it.
        specs: Mapping[str, Spec] = getattr(model, "specs", {})
        self._counted = [
            name
            for name, p in self.named.items()
            if (parallel.model_rank == 0 or (name in specs and specs[name].split is not None))
            and (parallel.data_rank == 0 or is_sharded(p))
        ]
        groups = [
            {
                "params": [p for name, p in self._stored.items() if decays(name) == with_decay],
                "weight_decay": weight_decay if with_decay else 0.0,
            }
            for with_decay in (True, False)
        ]
        groups = [group for group in groups if group["params"]]
        self.clip = clip_grad_norm
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared L2 norm of all gradients, a float32 scalar: to be summed over all ranks."""
        gradients = [_local(gradient) for name in self._counted if (gradient := self.named[name].grad) is not None]
        return torch.nn.utils.get_total_norm(gradients, norm_type=2.0, foreach=True).square()

    def step(self, lr: float, norm: Tensor, loss: Tensor) -> None:
        """One update from the parameters' gradients, which are then dropped.

        Args:
            lr: learning rate.
            norm: scalar, the L2 norm of the gradients of all ranks together.
            loss: scalar; where it or the norm is not finite, nothing changes.
        """
        for name, parameter in self.named.items():
            if parameter is not self._stored[name] and parameter.grad is not None:
                self._stored[name].grad = _local(parameter.grad)
                parameter.grad = None
        for group in self.adamw.param_groups:
            group["lr"] = lr
        # clip_grad_norm_'s factor: clip / (norm + 1e-6), at most 1. The kernel divides by grad_scale.
        self.adamw.grad_scale = ((norm + 1e-6) / self.clip).clamp_(min=1.0)  # type: ignore[attr-defined]
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def make_state(self) -> None:
        """Makes what the first step would make, where it is not there yet: the moments, all zero."""
        for parameter in self._stored.values():
            if not self.adamw.state[parameter]:
                moments = {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS}
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self.adamw.state[parameter] = {"step": step, **moments}

    def state_tensors(self) -> list[tuple[str, str, Tensor]]:
        """What is kept for each parameter: ("step" | "exp_avg" | "exp_avg_sq", its name, the rows stored here)."""
        return [
            (key, name, value)
            for name, parameter in self._stored.items()
            for key, value in self.adamw.state[parameter].items()
        ]

    def load_state(self, read: Callable[[str, Tensor], Tensor | None]) -> None:
        """Restores what `state_tensors` gave; `read` gets `KEY.NAME` and the parameter, and returns None if there is
        nothing, else the rows to be stored here."""
        for name, parameter in self.named.items():
            found = {key: read(f"{key}.{name}", parameter) for key in ("step", *MOMENTS)}
            self.adamw.state[self._stored[name]] = {key: value for key, value in found.items() if value is not None}


def _local(gradient: Tensor) -> Tensor:
    dealt = as_dtensor(gradient)
    return gradient if dealt is None else dealt.to_local()


def learning_rate(epoch: float, *, epochs: float, warmup_epochs: float, lr: float, min_lr: float) -> float:
    """Linear warm-up from 0 to `lr`, then half a cosine down to `min_lr` (LLaMA2-Accessory's schedule).

    `epoch` is passes over the data completed before this step, a fraction; so a warm-up's first step has rate 0.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = min(1.0, (epoch - warmup_epochs) / (epochs - warmup_epochs))
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
