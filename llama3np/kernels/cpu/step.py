"""A whole decode step, run by all threads together: few tokens through every layer to logits.

The same numbers as model.forward's, by the same formulas, in phases. What a phase computes is cut
into units that threads take one by one, and no unit of the next phase begins before the last one
of this is done:

    phase         unit                           computes, for all M tokens
    heads         a head of wq, wk or wv         norm; q, k, v; RoPE; k and v into the cache
    attention     token, kv head, key stretch    softmax and values of the stretch
    out           rows of wo                     stretches combined; h += wo attn
    gated         rows of w_gate and w_up        norm; silu(gate) * up
    down          rows of w_down                 h += w_down act
    logits        rows of the head               norm; logits, after the last layer

What all units of a phase need (a norm) each thread computes for itself: that is cheaper than to
wait for it. A product of a row is summed in one order, whoever takes it, so results depend neither
on the number of threads nor on chance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llama3np.kernels.cpu.attend import SCRATCH, SPLIT, attend_part, combine, store_row, turn_row
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.dots import row_dot, widen_row
from llama3np.kernels.cpu.shared import (
    address,
    all_done,
    bits_as_float,
    copy_bytes,
    finish_unit,
    floats,
    floats_2,
    floats_3,
    floats_4,
    integers,
    integers_2,
    take_unit,
    ticks,
    wait_for,
)
from llama3np.kernels.cpu.tiles import tile_dots
from llama3np.kernels.cpu.tokens import gate_row, norm_row

PHASES = 5  # of a layer
TILE = 4  # rows that are widened and multiplied together when there are several tokens

# Fields of a matrix in Model.matrices_XF.
CODE, OUT, IN, ROW_BYTES, PARTS, AXIS, FIRST_PART, UNIT = range(8)
# Rows of it: layer i's begin at 7 * i, the head is the last.
WQ, WK, WV, WO, W_GATE, W_UP, W_DOWN = range(7)


class Model(NamedTuple):
    """What does not change from step to step."""

    matrices_XF: np.ndarray  # int64, (7 L + 1, 8): format, shape, where its parts are
    parts: np.ndarray  # int64: addresses of the parts of all matrices
    attn_norm_LD: np.ndarray
    mlp_norm_LD: np.ndarray
    norm_D: np.ndarray
    eps: np.float32
    n_heads: int
    n_kv_heads: int
    head_dim: int
    interleaved: bool
    rounded: bool  # activations are rounded to bf16 before a product


class Step(NamedTuple):
    """One step: its tokens, its part of the cache, and room for what is between."""

    counters_PC: np.ndarray  # of shared.new_counters; first, so that its address is table[0]
    h_MD: np.ndarray  # in: embeddings; changed layer by layer
    cos_MP: np.ndarray
    sin_MP: np.ndarray
    rows_M: np.ndarray  # the cache's row of a token, and
    slots_M: np.ndarray  # its slot there; it sees the slots up to it
    cache_LX: np.ndarray  # int64, (L, 2): addresses of k_BKSH and v_BKSH
    cache_code: int
    cache_slots: int  # S of the whole cache
    q_MX: np.ndarray
    parts_MKXP: np.ndarray  # of attention, X stretches of keys: see attend_part
    act_MF: np.ndarray
    wanted_W: np.ndarray  # the tokens whose logits are wanted
    logits_WV: np.ndarray
    x_WX: np.ndarray  # each worker's own: what is multiplied, for all tokens,
    tile_WX: np.ndarray  # widened rows, and
    y_WMC: np.ndarray  # products of a unit
    ticks_P: np.ndarray  # out: when worker 0 had finished each phase


def own_floats(model: Model) -> int:
    """Float32 numbers of a worker's own: TILE rows widened and one put together, or attention's."""
    return max((TILE + 1) * int(model.matrices_XF[:, IN].max()), SCRATCH)


def table(arrays: NamedTuple) -> np.ndarray:
    """Addresses, sizes and numbers of a Model's or Step's fields, as `step` takes them.

    Compiled code counts the references to the arrays it is given, and threads that count at once
    wait for each other, at every row. It does not count what it finds by its address.
    """
    found: list[int] = []
    for field in arrays:
        if isinstance(field, np.ndarray):
            found += (address(field), *field.shape)
        else:
            found.append(int(field.view(np.int32)) if isinstance(field, np.float32) else field)
    return np.array(found, np.int64)


@jit
def _model(t):
    """The Model of a table."""
    return Model(
        integers_2(t[0], t[1], t[2]),
        integers(t[3], t[4]),
        floats_2(t[5], t[6], t[7]),
        floats_2(t[8], t[9], t[10]),
        floats(t[11], t[12]),
        bits_as_float(t[13]),
        t[14],
        t[15],
        t[16],
        t[17],
        t[18],
    )


@jit
def _step(t):
    """The Step of a table."""
    return Step(
        integers_2(t[0], t[1], t[2]),
        floats_2(t[3], t[4], t[5]),
        floats_2(t[6], t[7], t[8]),
        floats_2(t[9], t[10], t[11]),
        integers(t[12], t[13]),
        integers(t[14], t[15]),
        integers_2(t[16], t[17], t[18]),
        t[19],
        t[20],
        floats_2(t[21], t[22], t[23]),
        floats_4(t[24], t[25], t[26], t[27], t[28]),
        floats_2(t[29], t[30], t[31]),
        integers(t[32], t[33]),
        floats_2(t[34], t[35], t[36]),
        floats_2(t[37], t[38], t[39]),
        floats_2(t[40], t[41], t[42]),
        floats_3(t[43], t[44], t[45], t[46]),
        integers(t[47], t[48]),
    )


@jit
def run(worker, model_table, step_table):
    """Run one thread's share; the caller's thread, worker 0, comes back when all is done."""
    model, step = _model(model_table), _step(step_table)
    L = len(model.attn_norm_LD)
    step.ticks_P[0] = ticks() if worker == 0 else step.ticks_P[0]
    for layer in range(L):
        p = layer * PHASES
        _heads(worker, model, step, layer, p)
        _attention(worker, model, step, layer, p + 1)
        _out(worker, model, step, layer, p + 2)
        _gated(worker, model, step, layer, p + 3)
        _down(worker, model, step, layer, p + 4)
    _logits(worker, model, step, L * PHASES)


@jit
def _end(worker, step, phase, units):
    wait_for(step.counters_PC, phase, units)
    if worker == 0:
        step.ticks_P[phase + 1] = ticks()


# ---- the phases of a layer ----------------------------------------------------------------------


@jit
def _heads(worker, model, step, layer, phase):
    units = model.n_heads + 2 * model.n_kv_heads
    if not all_done(step.counters_PC, phase, units):
        x_MD = _own(worker, step, *step.h_MD.shape)
        _norm(step.h_MD, model.attn_norm_LD[layer], model, x_MD)
        unit = take_unit(step.counters_PC, phase, worker, units)
        while unit < units:
            _head(worker, model, step, layer, unit, x_MD)
            finish_unit(step.counters_PC, phase)
            unit = take_unit(step.counters_PC, phase, worker, units)
    _end(worker, step, phase, units)


@jit
def _head(worker, model, step, layer, unit, x_MD):
    """One head's q, k or v of every token, turned, and stored where it belongs."""
    N, K, H = model.n_heads, model.n_kv_heads, model.head_dim
    which = WQ if unit < N else (WK if unit < N + K else WV)
    head = unit - (0 if which == WQ else (N if which == WK else N + K))
    y_MC = step.y_WMC[worker]
    w = 7 * layer + which
    _product(worker, model, step, w, head * H, H, x_MD, y_MC.ctypes.data, 4 * y_MC.shape[1])
    item = 4 if step.cache_code == 0 else 2
    for m in range(len(y_MC)):
        y = y_MC[m].ctypes.data
        if which != WV:
            turn_row(
                y, step.cos_MP[m].ctypes.data, step.sin_MP[m].ctypes.data, H, model.interleaved
            )
        if which == WQ:
            for i in range(H):
                step.q_MX[m, head * H + i] = y_MC[m, i]
        else:
            slot = (step.rows_M[m] * K + head) * step.cache_slots + step.slots_M[m]
            base = step.cache_LX[layer, 0 if which == WK else 1]
            store_row(y, base + slot * H * item, H, step.cache_code)


@jit
def _attention(worker, model, step, layer, phase):
    M, K, X, _ = step.parts_MKXP.shape
    units = M * K * X
    unit = take_unit(step.counters_PC, phase, worker, units)
    while unit < units:
        _stretch(worker, model, step, layer, unit // (K * X), unit // X % K, unit % X)
        finish_unit(step.counters_PC, phase)
        unit = take_unit(step.counters_PC, phase, worker, units)
    _end(worker, step, phase, units)


@jit
def _stretch(worker, model, step, layer, m, k, x):
    """What the queries of a group find in one stretch of keys, if it is there for this token."""
    K, H = model.n_kv_heads, model.head_dim
    G = model.n_heads // K
    first, stop = x * SPLIT, min((x + 1) * SPLIT, step.slots_M[m] + 1)
    if first < stop:
        item = 4 if step.cache_code == 0 else 2
        offset = (step.rows_M[m] * K + k) * step.cache_slots * H * item
        q = step.q_MX[m, k * G * H :].ctypes.data
        keys, values = step.cache_LX[layer, 0] + offset, step.cache_LX[layer, 1] + offset
        part, scratch = step.parts_MKXP[m, k, x].ctypes.data, step.tile_WX[worker].ctypes.data
        attend_part(q, keys, values, step.cache_code, first, stop, G, H, part, scratch)


@jit
def _out(worker, model, step, layer, phase):
    w = 7 * layer + WO
    units = _units(model, w)
    if not all_done(step.counters_PC, phase, units):
        x_MX = _own(worker, step, *step.q_MX.shape)
        _combine(model, step, x_MX)
        _add_product(worker, model, step, w, phase, units, x_MX)
    _end(worker, step, phase, units)


@jit
def _combine(model, step, x_MX):
    """Put together what the queries found in all stretches: attn of every token."""
    K, H = model.n_kv_heads, model.head_dim
    G = model.n_heads // K
    P = step.parts_MKXP.shape[3]
    for m in range(len(x_MX)):
        n_parts = step.slots_M[m] // SPLIT + 1
        for k in range(K):
            out = x_MX[m, k * G * H :].ctypes.data
            combine(step.parts_MKXP[m, k].ctypes.data, n_parts, 4 * P, G, H, out)
        _round(model, x_MX[m])


@jit
def _gated(worker, model, step, layer, phase):
    w = 7 * layer + W_GATE
    units = _units(model, w)
    if not all_done(step.counters_PC, phase, units):
        x_MD = _own(worker, step, *step.h_MD.shape)
        _norm(step.h_MD, model.mlp_norm_LD[layer], model, x_MD)
        unit = take_unit(step.counters_PC, phase, worker, units)
        while unit < units:
            _gate_up(worker, model, step, w, unit, x_MD)
            finish_unit(step.counters_PC, phase)
            unit = take_unit(step.counters_PC, phase, worker, units)
    _end(worker, step, phase, units)


@jit
def _gate_up(worker, model, step, w, unit, x_MD):
    """silu(gate) * up for a unit of rows."""
    first, count = _rows(model, w, unit)
    y_MC = step.y_WMC[worker]
    stride = 4 * y_MC.shape[1]
    gate, up = y_MC.ctypes.data, y_MC.ctypes.data + 4 * model.matrices_XF[w, UNIT]
    _product(worker, model, step, w, first, count, x_MD, gate, stride)
    _product(worker, model, step, w + 1, first, count, x_MD, up, stride)
    for m in range(len(y_MC)):
        act_C = step.act_MF[m, first : first + count]
        gate_row(gate + m * stride, up + m * stride, act_C.ctypes.data, count)
        _round(model, act_C)


@jit
def _down(worker, model, step, layer, phase):
    w = 7 * layer + W_DOWN
    units = _units(model, w)
    _add_product(worker, model, step, w, phase, units, step.act_MF)
    _end(worker, step, phase, units)


@jit
def _add_product(worker, model, step, w, phase, units, x_MX):
    """H += w x, unit by unit."""
    y_MC = step.y_WMC[worker]
    unit = take_unit(step.counters_PC, phase, worker, units)
    while unit < units:
        first, count = _rows(model, w, unit)
        _product(worker, model, step, w, first, count, x_MX, y_MC.ctypes.data, 4 * y_MC.shape[1])
        for m in range(len(y_MC)):
            for i in range(count):
                step.h_MD[m, first + i] += y_MC[m, i]
        finish_unit(step.counters_PC, phase)
        unit = take_unit(step.counters_PC, phase, worker, units)


@jit
def _logits(worker, model, step, phase):
    w = len(model.matrices_XF) - 1
    units = _units(model, w)
    if not all_done(step.counters_PC, phase, units):
        W = len(step.wanted_W)
        x_WD, y_WC = _own(worker, step, W, step.h_MD.shape[1]), step.y_WMC[worker]
        for i in range(W):
            m = step.wanted_W[i]
            _norm(step.h_MD[m : m + 1], model.norm_D, model, x_WD[i : i + 1])
        unit = take_unit(step.counters_PC, phase, worker, units)
        while unit < units:
            first, count = _rows(model, w, unit)
            _product(
                worker, model, step, w, first, count, x_WD, y_WC.ctypes.data, 4 * y_WC.shape[1]
            )
            for i in range(W):
                for j in range(count):
                    step.logits_WV[i, first + j] = y_WC[i, j]
            finish_unit(step.counters_PC, phase)
            unit = take_unit(step.counters_PC, phase, worker, units)
    _end(worker, step, phase, units)


# ---- what phases are made of --------------------------------------------------------------------


@jit
def _own(worker, step, rows, columns):
    """A worker's own room for what is multiplied, as a matrix without gaps."""
    return floats_2(step.x_WX[worker].ctypes.data, rows, columns)


@jit
def _norm(h_MD, weight_D, model, x_MD):
    """RMSNorm of every token, model.rms_norm."""
    D, weight = h_MD.shape[1], weight_D.ctypes.data
    for m in range(len(h_MD)):
        norm_row(h_MD[m].ctypes.data, weight, model.eps, x_MD[m].ctypes.data, D)
        _round(model, x_MD[m])


@jit
def _round(model, x_D):
    """To the nearest bf16, ties to even, in place, if the profile wants activations rounded."""
    if model.rounded:
        for i in range(len(x_D)):
            bits = x_D[i : i + 1].view(np.uint32)
            if x_D[i] == x_D[i]:  # the carry would make an infinity of a nan
                odd = (bits[0] >> np.uint32(16)) & np.uint32(1)
                bits[0] = (bits[0] + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)


@jit
def _units(model, w):
    """The number of units that the rows of a matrix are taken in."""
    rows, unit = model.matrices_XF[w, OUT], model.matrices_XF[w, UNIT]
    return (rows + unit - 1) // unit


@jit
def _rows(model, w, unit):
    """The rows of a unit: the first, and how many."""
    rows, size = model.matrices_XF[w, OUT], model.matrices_XF[w, UNIT]
    return unit * size, min(size, rows - unit * size)


@jit
def _product(worker, model, step, w, first, count, x_MI, y, stride):
    """Write row first + i of the matrix times x[m] to y + m * stride + 4 * i, for count rows."""
    code, n = model.matrices_XF[w, CODE], model.matrices_XF[w, IN]
    M, x, tile = len(x_MI), x_MI.ctypes.data, step.tile_WX[worker].ctypes.data
    spare = tile + 4 * TILE * n
    if M == 1:
        y_C = floats(y, count)
        for i in range(count):
            y_C[i] = row_dot(code, _row(model, w, first + i, spare), x, n, tile)
        return
    for i in range(0, count, TILE):
        rows = min(TILE, count - i)
        for r in range(rows):
            widen_row(code, _row(model, w, first + i + r, spare), tile + 4 * r * n, n)
        tile_dots(tile, rows, x, M, n, y + 4 * i, stride)


@jit
def _row(model, w, row, spare):
    """The address of a row, which lies in one part, or of a copy put together from all parts."""
    parts, axis = model.matrices_XF[w, PARTS], model.matrices_XF[w, AXIS]
    row_bytes, first_part = model.matrices_XF[w, ROW_BYTES], model.matrices_XF[w, FIRST_PART]
    if parts == 1:
        return model.parts[first_part] + row * row_bytes
    if axis == 0:
        height = model.matrices_XF[w, OUT] // parts
        return model.parts[first_part + row // height] + row % height * row_bytes
    n_bytes = model.matrices_XF[w, IN] * (4 if model.matrices_XF[w, CODE] == 0 else 2) // parts
    for part in range(parts):
        copy_bytes(
            model.parts[first_part + part] + row * row_bytes, spare + part * n_bytes, n_bytes
        )
    return spare
