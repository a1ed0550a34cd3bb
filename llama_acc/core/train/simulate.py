"""What one rank of many would hold, found by building it: on the meta device, with torch's fake process group."""

import math
from dataclasses import dataclass

from torch import nn

from llama_acc.core.distributed.groups import Parallel, local_part, simulated
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.optimizer import MOMENTS
from llama_acc.core.train.plan import Plan


@dataclass(frozen=True)
class RankShare:
    """What lasts from step to step on one rank.

    Attributes:
        rank: which one.
        world_size: of how many.
        parameters: numbers it stores of the model.
        weights: bytes of these.
        gradients: bytes of the gradients of what trains, of those that stay from one micro-batch to the next.
        moments: bytes of the optimizer's state.
    """

    rank: int
    world_size: int
    parameters: int
    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        """Bytes in all, without activations, gathered parameters and buffers."""
        return self.weights + self.gradients + self.moments


def rank_share(plan: Plan, world_size: int, rank: int = 0) -> RankShare:
    """Builds one rank of `world_size` without its memory. Rank 0 has most: it is the first to get an odd row.

    Raises:
        UserError: the processes cannot be shared out in model-parallel groups.
    """
    settings = plan.recipe.parallel
    with simulated(rank, world_size, settings.model_parallel_size) as parallel:
        model = plan.model_on_meta(parallel)
        DataParallel(model, parallel, settings.data_parallel, settings.accumulate_unsharded, "cpu")
        parameters = list(model.parameters())
        stored = [local_part(parameter).tensor for parameter in parameters]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        vision = plan.config.vision
        # The vision tower is on the first rank of each model-parallel group, whole.
        has_tower = vision is not None and parallel.model_rank == 0
        tower = sum(math.prod(shape) for shape in vision.tower_shapes().values()) if vision and has_tower else 0
        return RankShare(
            rank,
            world_size,
            # Of what is quantised, a byte holds two.
            parameters=sum(tensor.numel() * (1 if tensor.is_floating_point() else 2) for tensor in stored) + tower,
            weights=sum(tensor.nbytes for tensor in (*stored, *model.buffers())) + tower * plan.compute_dtype.itemsize,
            gradients=_gradient_bytes(plan, parallel, trained),
            moments=len(MOMENTS) * sum(local_part(parameter).tensor.nbytes for parameter in trained),
        )


def _gradient_bytes(plan: Plan, parallel: Parallel, trained: list[nn.Parameter]) -> int:
    """Gradients are those of what is stored, but whole where they are summed over the ranks only once a step."""
    settings = plan.recipe.parallel
    once_a_step = settings.data_parallel == "sdp" or (
        settings.data_parallel == "fsdp" and settings.accumulate_unsharded
    )
    if parallel.data_size > 1 and once_a_step:
        return sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return sum(local_part(parameter).tensor.nbytes for parameter in trained)
