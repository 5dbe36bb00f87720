"""What a layer should be quantized towards when its inputs are no longer those of the dense model.

Behind compressed layers a layer gets inputs X̂ where the dense model has X. A weight Q that is chosen to keep what the
dense layer gives, W X, and not what the dense weight makes of the wrong inputs, W X̂, makes up for a part of the error
that comes in. That is the objective of GPTAQ:

    ‖W X - Q X̂‖² + λ ‖W - Q‖²  =  tr((T - Q)(Ĥ + λ)(T - Q)ᵀ) + a constant,   T = W + W (X - X̂) X̂ᵀ (Ĥ + λ)⁻¹

with Ĥ = X̂ X̂ᵀ and λ the damping that GPTQ adds in any case. So whatever quantizes a weight with a Hessian does it as
before, with T for W and Ĥ for H. GPTAQ's own algorithm hands the residual of a column only to the columns to come; here
every column takes its part of it before the first is quantized, which is the least of the same objective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.errors import NotFinite
from layerwise.stages.compress.precision import working_dtype
from layerwise.stages.compress.recursion import inverse_factor

if TYPE_CHECKING:
    from torch import Tensor


def towards_dense(weight: Tensor, hessian: Tensor, residual: Tensor, damp_percent: float) -> Tensor:
    """The weight T that is to be quantized with the Hessian of the inputs of the compressed prefix.

    Args:
        weight: (out, in), any float dtype; not changed.
        hessian: (in, in), `X̂ X̂ᵀ`, any float dtype; not changed.
        residual: (in, in), `(X - X̂) X̂ᵀ`.
        damp_percent: as of `gptq`, of which the quantization behind it has the same.
    Returns:
        (out, in), in the precision of `precision.py`. Where all inputs of a column are zero, the weight as it was.
    Raises:
        NotFinite: NaN or Inf in one of the three, or no damping makes the Hessian positive definite.
    Source: GPTAQ, arXiv:2504.02692, section 4: its objective, minimized for all columns at a time.
    """
    dtype = working_dtype(weight.device)
    W, H, cross = (tensor.detach().to(weight.device, dtype, copy=True) for tensor in (weight, hessian, residual))
    for what, tensor in (("weight", W), ("Hessian", H), ("residual", cross)):
        if not tensor.isfinite().all():
            raise NotFinite(f"the {what} of the compressed prefix has NaN or Inf", hint="apply without `remake`")
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    cross[:, dead] = 0
    U, _ = inverse_factor(H, damp_percent)
    return W + W @ cross @ U.T @ U  # UᵀU = (Ĥ + λ)⁻¹
