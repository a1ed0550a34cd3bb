"""The learning rate as a function of the fractional epoch."""

import math


def learning_rate(epoch: float, *, epochs: float, warmup_epochs: float, lr: float, min_lr: float) -> float:
    """Linear warm-up from 0 to `lr`, then half a cosine down to `min_lr` (LLaMA2-Accessory's schedule).

    Args:
        epoch: passes over the data completed before this step, a fraction; so a warm-up's first step has rate 0.
        epochs: length of the schedule.
        warmup_epochs: length of the warm-up.
        lr: the highest rate.
        min_lr: the last rate.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = min(1.0, (epoch - warmup_epochs) / (epochs - warmup_epochs))
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
