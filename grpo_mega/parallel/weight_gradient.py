"""Where the gradient of the output layer goes when we form it ourselves: megatron's protocol for `main_grad`.

megatron's linears add to `main_grad` in their backward and say so in `grad_added_to_main_grad`, upon which the hook of
its gradient buffers (distributed_data_parallel.py) does not add what autograd brings, unless `zero_out_wgrad` is set:
then the weight is also the embedding of this stage, whose lookup's gradient does come by autograd, and what we return
is added to that and must be zeros. Something must be returned, or the hook does not send the bucket.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What products are added to: `weight.main_grad`, or zeros of `dtype` for a weight that megatron does not hold."""
    main = getattr(weight, "main_grad", None)
    return torch.zeros(weight.shape, dtype=dtype, device=weight.device) if main is None else main


def for_autograd(weight: Tensor, gradient: Tensor) -> Tensor:
    """What a backward returns for the weight, once `gradient`, its `accumulator`, holds the gradient."""
    if getattr(weight, "main_grad", None) is None:
        return gradient.to(weight.dtype)
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010  (a tensor has no such field)
    make = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty  # neither touches its pages
    return make(weight.shape, dtype=weight.dtype, device=weight.device)
