"""AdamW, with clipping and the guard against non-finite steps inside the update itself."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter: on all but biases and norm weights (LLaMA2-Accessory's rule)."""
    return not name.endswith((".bias", "norm.weight"))


class ClippedAdamW:
    """Fused AdamW whose one pass over the parameters also clips, and skips a step that is not finite.

    The gradients are divided by max(1, norm / clip) inside the fused kernel, and a non-finite norm or loss makes the
    kernel leave weights, moments and step count alone, all on the device: the host need not wait.
    """

    def __init__(
        self, model: nn.Module, *, betas: tuple[float, float], eps: float, weight_decay: float, clip_grad_norm: float
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for name, p in named.items() if decays(name)], "weight_decay": weight_decay},
            {"params": [p for name, p in named.items() if not decays(name)], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.named = named
        self.clip = clip_grad_norm
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def step(self, lr: float, loss: Tensor) -> Tensor:
        """One update from the parameters' gradients, which are then dropped.

        Args:
            lr: learning rate.
            loss: scalar; where it or the gradients' norm is not finite, nothing changes.

        Returns:
            The gradients' global L2 norm before clipping, a scalar on the device.
        """
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        norm = total_norm(gradients)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        # clip_grad_norm_'s factor: clip / (norm + 1e-6), at most 1. The kernel divides by grad_scale.
        self.adamw.grad_scale = ((norm + 1e-6) / self.clip).clamp_(min=1.0)  # type: ignore[attr-defined]
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments and step counts, as `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
        tensors = {}
        for name, parameter in self.named.items():
            for key, value in self.adamw.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave."""
        for name, parameter in self.named.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            self.adamw.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(parameter.device, copy=True) for key in keys
            }


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, a float32 scalar."""
    return torch.nn.utils.get_total_norm(list(gradients), norm_type=2.0, foreach=True)
