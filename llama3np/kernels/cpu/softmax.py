"""The softmax of attention by blocks, compiled: two passes over a block where NumPy makes six."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.exp import exp_f32


@intrinsic
def _larger(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of two float32, nan if one is nan: a loop over it is vectorised, over max not."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 2)
        maximum = builder.module.declare_intrinsic("llvm.maximum", [ir.FloatType()], kind)
        return builder.call(maximum, args)

    return types.float32(types.float32, types.float32), codegen


@jit
def soften(scores_RC, counts_R, peaks_R, totals_R, sums_RH):
    """See kernels/attention.py, whose `soften` is the oracle; float32, all arrays contiguous."""
    R, C = scores_RC.shape
    for r in range(R):
        count = min(max(counts_R[r], 0), C)
        row_C = scores_RC[r]
        peak = peaks_R[r]
        for c in range(count):
            peak = _larger(peak, row_C[c])
        total = np.float32(0)
        for c in range(count):
            weight = exp_f32(row_C[c] - peak)
            row_C[c] = weight
            total += weight
        row_C[count:] = 0
        if peak != peaks_R[r]:
            fading = exp_f32(peaks_R[r] - peak)
            totals_R[r] *= fading
            for h in range(sums_RH.shape[1]):
                sums_RH[r, h] *= fading
            peaks_R[r] = peak
        totals_R[r] += total
