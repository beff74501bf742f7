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

Arrays are handed over by their addresses, in records: compiled code counts the references to
arrays that it is given, and threads that count at once wait for each other, at every row.
"""

from __future__ import annotations

import numpy as np

from llama3np.kernels.cpu.attend import SCRATCH, SPLIT, attend_part, combine, store_row, turn_row
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.dots import row_dot, widen_row
from llama3np.kernels.cpu.shared import (
    all_done,
    copy_bytes,
    each_unit,
    floats,
    integers,
    records,
    ticks,
    wait_for,
)
from llama3np.kernels.cpu.tiles import tile_dots
from llama3np.kernels.cpu.tokens import gate_row, norm_row, round_row

PHASES = 5  # of a layer; the logits are one more
TILE = 4  # rows that are widened and multiplied together when there are several tokens

# ---- what a step is told: sizes, and addresses of arrays without gaps ----------------------------

MATRIX = np.dtype(
    [
        ("code", "i8"),  # ggml's number of the format, F32 is 0
        ("weights", "i8"),  # of a block, 1 if they are plain numbers
        ("n_out", "i8"),
        ("n_in", "i8"),
        ("row_bytes", "i8"),  # from one row to the next
        ("parts", "i8"),  # how many arrays it is in,
        ("axis", "i8"),  # joined along which axis, and
        ("first_part", "i8"),  # where their addresses begin
        ("part_bytes", "i8"),  # of a row in one of them
        ("unit", "i8"),  # rows that a thread takes at a time
    ]
)
WQ, WK, WV, WO, W_GATE, W_UP, W_DOWN = range(7)  # of layer i at 7 * i; the head is the last of all

MODEL = np.dtype(
    [
        *((name, "i8") for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim")),
        *((name, "i8") for name in ("ffn_dim", "vocab_size", "interleaved")),
        ("rounded", "i8"),  # whether activations are rounded to bf16 before a product
        ("eps", "f4"),
        ("matrices", "i8"),  # MATRIX (7 L + 1)
        ("parts", "i8"),  # int64: addresses of the parts of all matrices
        *((name, "i8") for name in ("attn_norm_LD", "mlp_norm_LD", "norm_D")),
    ]
)

STEP = np.dtype(
    [
        ("counters_PC", "i8"),  # of shared.new_counters
        ("tokens", "i8"),  # M
        ("wanted", "i8"),  # W, tokens whose logits are wanted
        ("workers", "i8"),
        ("stretches", "i8"),  # X, of keys, of the longest row
        ("cache_code", "i8"),  # format of keys and values, bytes of a number,
        ("cache_item", "i8"),
        ("cache_slots", "i8"),  # and slots of a row
        ("cache_L2", "i8"),  # int64: addresses of k_BKSH and v_BKSH of each layer
        ("rows_M", "i8"),  # int64: the cache's row of a token, and
        ("slots_M", "i8"),  # its slot there; it sees the slots up to it
        ("wanted_W", "i8"),  # int64: which tokens
        *((name, "i8") for name in ("cos_MP", "sin_MP")),
        ("h_MD", "i8"),  # in: embeddings; changed layer by layer
        ("q_MX", "i8"),
        ("parts_MKX", "i8"),  # of attention: see attend_part
        ("act_MF", "i8"),
        ("logits_WV", "i8"),  # out
        ("own", "i8"),  # each worker's own room, `own_bytes` long: see own_floats
        ("own_bytes", "i8"),
        ("x_bytes", "i8"),  # of it, first, what is multiplied, for all tokens; then products
        ("y_bytes", "i8"),  # of a unit, `y_stride` bytes for each token; then widened rows
        ("y_stride", "i8"),
        ("ticks_P", "i8"),  # int64, out: when worker 0 had finished each phase
    ]
)


@jit
def run(worker, model_1, step_1):
    """Run one thread's share; the caller's thread, worker 0, comes back when all is done."""
    model, step = model_1[0], step_1[0]
    if worker == 0:
        integers(step.ticks_P, 1)[0] = ticks()
    for layer in range(model.n_layers):
        phase = layer * PHASES
        _heads(worker, model, step, layer, phase)
        _attention(worker, model, step, layer, phase + 1)
        _out(worker, model, step, layer, phase + 2)
        _gated(worker, model, step, layer, phase + 3)
        _down(worker, model, step, layer, phase + 4)
    _logits(worker, model, step, model.n_layers * PHASES)


@jit
def _end(worker, step, phase, units):
    wait_for(_counters(step, phase), units)
    if worker == 0:
        integers(step.ticks_P + 8 * phase, 2)[1] = ticks()


@jit
def _counters(step, phase):
    """Where the counters of a phase are: a cache line for each worker and one more."""
    return step.counters_PC + 64 * (1 + step.workers) * phase


# ---- the phases of a layer ----------------------------------------------------------------------


@jit
def _heads(worker, model, step, layer, phase):
    counters, units = _counters(step, phase), model.n_heads + 2 * model.n_kv_heads
    if not all_done(counters, units):
        _norm(worker, model, step, model.attn_norm_LD + 4 * model.dim * layer)
        for unit in each_unit(counters, worker, step.workers, units):
            _head(worker, model, step, layer, unit)
    _end(worker, step, phase, units)


@jit
def _head(worker, model, step, layer, unit):
    """One head's q, k or v of every token, turned, and stored where it belongs."""
    N, K, H = model.n_heads, model.n_kv_heads, model.head_dim
    which = WQ if unit < N else (WK if unit < N + K else WV)
    head = unit - (0 if which == WQ else (N if which == WK else N + K))
    w, y = _matrix(model, 7 * layer + which), _products(worker, step)
    _multiply(worker, model, step, w, head * H, H, _own(worker, step), step.tokens, y)
    for m in range(step.tokens):
        row = y + step.y_stride * m
        if which != WV:
            angle = 2 * H * m  # H / 2 numbers of 4 bytes
            turn_row(row, step.cos_MP + angle, step.sin_MP + angle, H, model.interleaved)
        if which == WQ:
            copy_bytes(row, step.q_MX + 4 * H * (N * m + head), 4 * H)
        else:
            base = integers(step.cache_L2 + 16 * layer, 2)[which - WK]
            base += _row_in_cache(model, step, m, head)
            slot = integers(step.slots_M, step.tokens)[m]
            store_row(row, base + slot * H * step.cache_item, H, step.cache_code)


@jit
def _row_in_cache(model, step, m, head):
    """Bytes from the beginning of a layer's keys to those of token m's row and a head."""
    row = integers(step.rows_M, step.tokens)[m]
    return (row * model.n_kv_heads + head) * step.cache_slots * model.head_dim * step.cache_item


@jit
def _attention(worker, model, step, layer, phase):
    K, X = model.n_kv_heads, step.stretches
    counters, units = _counters(step, phase), step.tokens * K * X
    for unit in each_unit(counters, worker, step.workers, units):
        _stretch(worker, model, step, layer, unit // (K * X), unit // X % K, unit % X)
    _end(worker, step, phase, units)


@jit
def _stretch(worker, model, step, layer, m, k, x):
    """What the queries of a group find in one stretch of keys, if it is there for this token."""
    K, H, cache = model.n_kv_heads, model.head_dim, integers(step.cache_L2 + 16 * layer, 2)
    G = model.n_heads // K
    first, stop = x * SPLIT, min((x + 1) * SPLIT, integers(step.slots_M, step.tokens)[m] + 1)
    if first < stop:
        offset = _row_in_cache(model, step, m, k)
        q = step.q_MX + 4 * H * (model.n_heads * m + k * G)
        part = step.parts_MKX + _part_bytes(model) * ((m * K + k) * step.stretches + x)
        k_SH, v_SH, room = cache[0] + offset, cache[1] + offset, _own(worker, step)
        attend_part(q, k_SH, v_SH, step.cache_code, first, stop, G, H, part, room)


@jit
def _part_bytes(model):
    """Bytes of what attend_part writes."""
    return 4 * model.n_heads // model.n_kv_heads * (model.head_dim + 2)


@jit
def _out(worker, model, step, layer, phase):
    counters, w = _counters(step, phase), _matrix(model, 7 * layer + WO)
    units = _units(w)
    if not all_done(counters, units):
        _combine(worker, model, step)
        _add_product(worker, model, step, w, counters, units, _own(worker, step))
    _end(worker, step, phase, units)


@jit
def _combine(worker, model, step):
    """Put together what the queries found in all stretches: attn of every token."""
    K, H = model.n_kv_heads, model.head_dim
    G, stride = model.n_heads // K, _part_bytes(model)
    for m in range(step.tokens):
        n_parts = integers(step.slots_M, step.tokens)[m] // SPLIT + 1
        for k in range(K):
            out = _own(worker, step) + 4 * H * (model.n_heads * m + k * G)
            part = step.parts_MKX + stride * (m * K + k) * step.stretches
            combine(part, n_parts, stride, G, H, out)
    if model.rounded:
        round_row(_own(worker, step), step.tokens * model.n_heads * H)


@jit
def _gated(worker, model, step, layer, phase):
    counters, w = _counters(step, phase), _matrix(model, 7 * layer + W_GATE)
    units = _units(w)
    if not all_done(counters, units):
        _norm(worker, model, step, model.mlp_norm_LD + 4 * model.dim * layer)
        for unit in each_unit(counters, worker, step.workers, units):
            _gate_up(worker, model, step, layer, unit)
    _end(worker, step, phase, units)


@jit
def _gate_up(worker, model, step, layer, unit):
    """silu(gate) * up for a unit of rows."""
    w_gate, w_up = _matrix(model, 7 * layer + W_GATE), _matrix(model, 7 * layer + W_UP)
    x, gate = _own(worker, step), _products(worker, step)
    first, count = _rows(w_gate, unit)
    up = gate + 4 * w_gate.unit
    _multiply(worker, model, step, w_gate, first, count, x, step.tokens, gate)
    _multiply(worker, model, step, w_up, first, count, x, step.tokens, up)
    for m in range(step.tokens):
        act = step.act_MF + 4 * (model.ffn_dim * m + first)
        gate_row(gate + step.y_stride * m, up + step.y_stride * m, act, count)
        if model.rounded:
            round_row(act, count)


@jit
def _down(worker, model, step, layer, phase):
    counters, w = _counters(step, phase), _matrix(model, 7 * layer + W_DOWN)
    units = _units(w)
    _add_product(worker, model, step, w, counters, units, step.act_MF)
    _end(worker, step, phase, units)


@jit
def _add_product(worker, model, step, w, counters, units, x):
    """The residual: h += w x, unit by unit."""
    y = _products(worker, step)
    for unit in each_unit(counters, worker, step.workers, units):
        first, count = _rows(w, unit)
        _multiply(worker, model, step, w, first, count, x, step.tokens, y)
        for m in range(step.tokens):
            h_C = floats(step.h_MD + 4 * (model.dim * m + first), count)
            y_C = floats(y + step.y_stride * m, count)
            for i in range(count):
                h_C[i] += y_C[i]


@jit
def _logits(worker, model, step, phase):
    counters, w = _counters(step, phase), _matrix(model, 7 * model.n_layers)
    units, x, y = _units(w), _own(worker, step), _products(worker, step)
    if not all_done(counters, units):
        for i in range(step.wanted):
            h = step.h_MD + 4 * model.dim * integers(step.wanted_W, step.wanted)[i]
            _norm_one(model, h, model.norm_D, x + 4 * model.dim * i)
        for unit in each_unit(counters, worker, step.workers, units):
            first, count = _rows(w, unit)
            _multiply(worker, model, step, w, first, count, x, step.wanted, y)
            for i in range(step.wanted):
                row = step.logits_WV + 4 * (model.vocab_size * i + first)
                copy_bytes(y + step.y_stride * i, row, 4 * count)
    _end(worker, step, phase, units)


# ---- what phases are made of --------------------------------------------------------------------


def own_floats(model: np.void, matrices: np.ndarray, tokens: int) -> tuple[int, int, int, int]:
    """A worker's own room: numbers of x, of y, between tokens of y, and of all of it together.

    x is the longest of what is multiplied; attention, which comes before it, uses the same room.
    y is two units of rows, or a head. After it come TILE widened rows, and one put together.
    """
    x = max(tokens * max(int(model["dim"]), int(model["n_heads"] * model["head_dim"])), SCRATCH)
    stride = 2 * max(int(matrices["unit"].max()), int(model["head_dim"]))
    rows = (TILE + 1) * int(matrices["n_in"].max())
    x, stride, rows = (-(-size // 16) * 16 for size in (x, stride, rows))  # whole cache lines
    return x, tokens * stride, stride, x + tokens * stride + rows


@jit
def _own(worker, step):
    """A worker's own room for what is multiplied."""
    return step.own + step.own_bytes * worker


@jit
def _products(worker, step):
    """A worker's own room for products."""
    return _own(worker, step) + step.x_bytes


@jit
def _norm(worker, model, step, weight):
    """RMSNorm of every token into a worker's own room."""
    for m in range(step.tokens):
        offset = 4 * model.dim * m
        _norm_one(model, step.h_MD + offset, weight, _own(worker, step) + offset)


@jit
def _norm_one(model, h, weight, x):
    norm_row(h, weight, model.eps, x, model.dim)
    if model.rounded:
        round_row(x, model.dim)


@jit
def _matrix(model, w):
    return records(model.matrices, 7 * model.n_layers + 1, MATRIX)[w]


@jit
def _units(w):
    """The number of units that the rows of a matrix are taken in."""
    return (w.n_out + w.unit - 1) // w.unit


@jit
def _rows(w, unit):
    """The rows of a unit: the first, and how many."""
    return unit * w.unit, min(w.unit, w.n_out - unit * w.unit)


@jit
def _multiply(worker, model, step, w, first, count, x, tokens, y):
    """Write row first + i of the matrix times x[m] to y + y_stride * m + 4 * i."""
    n, tile = w.n_in, _products(worker, step) + step.y_bytes
    spare = tile + 4 * TILE * n
    if tokens == 1:
        y_C = floats(y, count)
        for i in range(count):
            y_C[i] = row_dot(w.code, _row(model, w, first + i, spare), x, n)
        return
    if w.parts == 1 and w.weights == 1:
        row = _row(model, w, first, spare)
        tile_dots(w.code, row, w.row_bytes, count, x, 4 * n, tokens, n, y, step.y_stride)
        return
    for i in range(0, count, TILE):
        rows = min(TILE, count - i)
        for r in range(rows):
            widen_row(w.code, _row(model, w, first + i + r, spare), tile + 4 * r * n, n)
        tile_dots(0, tile, 4 * n, rows, x, 4 * n, tokens, n, y + 4 * i, step.y_stride)


@jit
def _row(model, w, row, spare):
    """The address of a row, which lies in one part, or of a copy put together from all parts."""
    parts = model.parts + 8 * w.first_part
    if w.parts == 1:
        return integers(parts, 1)[0] + row * w.row_bytes
    if w.axis == 0:
        height = w.n_out // w.parts
        return integers(parts, w.parts)[row // height] + row % height * w.row_bytes
    for i in range(w.parts):
        part = integers(parts, w.parts)[i]
        copy_bytes(part + row * w.row_bytes, spare + i * w.part_bytes, w.part_bytes)
    return spare
