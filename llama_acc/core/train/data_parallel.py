"""Data parallelism, applied to a model from outside: replicated, or sharded with FSDP2.

ddp    every rank keeps all parameters, gradients and moments; gradients are summed on the last micro-batch of a step.
sdp    parameters and moments are sharded, but the parameters stay gathered until the step's last backward pass has
       used them; gradients are summed on the last micro-batch.
fsdp   parameters are gathered for each block's forward and backward pass and given back; gradients are reduced and
       scattered after each micro-batch, or, with `accumulate_unsharded`, on the last one.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.model.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

Mode = Literal["ddp", "sdp", "fsdp"]


class DataParallel:
    """A model's data parallelism. With one data-parallel rank there is none, and nothing happens."""

    def __init__(
        self, model: Transformer, parallel: Parallel, mode: Mode, accumulate_unsharded: bool, device_type: str
    ) -> None:
        """Makes `DTensor`s of the parameters, which may be on the meta device. Activation checkpointing and compilation
        are applied before."""
        self.mode = mode
        self._each_reduces = mode == "fsdp" and not accumulate_unsharded
        self._modules: list[FSDPModule] = []
        if parallel.data_size == 1:
            return
        assert parallel.data_group is not None
        # They take a second to import, which a process on its own is spared.
        from torch.distributed import fsdp
        from torch.distributed.device_mesh import DeviceMesh

        mesh = DeviceMesh.from_group(parallel.data_group, device_type)
        # What trains is float32, and so is the sum of its gradients; it is gathered in the type it is computed in.
        compute = None if model.dtype == torch.float32 else model.dtype
        policy = fsdp.MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        apply: Any = partial(fsdp.fully_shard, reshard_after_forward=mode == "fsdp")
        if mode == "ddp":
            from torch.distributed._composable.replicate_with_fsdp import replicate as apply
        for module in (*model.layers, model):
            apply(module, mesh=mesh, mp_policy=policy)
            assert isinstance(module, fsdp.FSDPModule)
            # The loss is already divided by the step's label tokens: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            self._modules.append(module)
        # The output matrix is the whole model's own, and is gathered for decoding as for the loss.
        fsdp.register_fsdp_forward_method(model, "logits")

    def before_backward(self, last: bool) -> None:
        """To be called before each micro-batch of a step; `last`: it is the step's last one."""
        if not self._modules:
            return
        root = self._modules[-1]
        root.set_requires_gradient_sync(last or self._each_reduces)
        if self.mode == "sdp":
            root.set_reshard_after_backward(last)

    def after_evaluation(self) -> None:
        """To be called after forward passes without a backward pass: the next step changes what they gathered."""
        for module in self._modules:
            module.reshard()
