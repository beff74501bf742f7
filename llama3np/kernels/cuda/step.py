"""A decode step: one token of each row of one cache, through our own kernels, in buffers made once.

obey, embed, then 7 launches a layer (wq wk wv, turn, attend, combine, wo, gate and up, down; more
where a layer mixes formats), and the head. Tokens and positions are in the device's memory and
grids are made for a full cache, so that all launches are the same at every step: the second
step captures them in a CUDA graph, and from then on a step is one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from math import sqrt
from typing import Any, NamedTuple, TypeVar, cast

import cupy as cp
import numpy as np

from llama3np.config import Config
from llama3np.kernels.cuda import registry
from llama3np.kernels.cuda.launch import launch
from llama3np.kernels.cuda.pinned import Pinned
from llama3np.kernels.cuda.registry import BATCHES, PARTS, STRETCH, WARPS
from llama3np.kernels.cuda.sieve import Sieve
from llama3np.kernels.cuda.weights import aligned, format_of, stored
from llama3np.model import rope_tables
from llama3np.params import Layer, Params
from llama3np.sample import Sampling

Call = TypeVar("Call", bound=Callable[..., Any])

MOST_ROWS = BATCHES[-1]
RECORDS = 64  # tokens that a greedy run chooses before the host looks at them


class Model:
    """What steps need of a model, made once: norms as float32 rows, and tables of angles.

    Raises KeyError for weights of a dtype that no kernel reads.
    """

    def __init__(self, params: Params, config: Config, rounded: bool):
        self.params, self.config, self.rounded = params, config, int(rounded)
        matrices = (
            params.embed_VD,
            params.head_VD,
            *(w for y in params.layers for w in matrices_of(y)),
        )
        self.formats = {format_of(w) for w in matrices}
        self.norms = [(whole(y.attn_norm_D), whole(y.mlp_norm_D)) for y in params.layers]
        self.norm = whole(params.norm_D)
        self._tables: tuple[Any, Any] | None = None

    def tables(self, slots: int) -> tuple[Any, Any]:
        """cos_SP and sin_SP of at least so many positions: the CPU's, uploaded."""
        if self._tables is None or len(self._tables[0]) < slots:
            cos_1SP, sin_1SP = rope_tables(self.config, np.arange(slots)[None], "float32")
            self._tables = cp.asarray(cos_1SP[0]), cp.asarray(sin_1SP[0])
        return self._tables


def matrices_of(layer: Layer) -> list[Any]:
    """The seven weights of a layer that products read."""
    return [w for w in layer if len(w.shape) == 2]


def whole(w_D: Any) -> Any:
    """A vector in float32, with zeros up to a multiple of four: what kernels read at a time."""
    out_P = cp.zeros(pitch_of(w_D.size), np.float32)
    out_P[: w_D.size] = w_D
    return out_P


def pitch_of(size: int) -> int:
    """Numbers from one row of a buffer to the next: rows begin at multiples of 16 bytes."""
    return -(-size // 4) * 4


class Buffers(NamedTuple):
    """What a step works in: M rows, those beyond the cache's idle; heads have N*H numbers."""

    h_MD: Any  # the residual stream
    qkv_MX: Any  # X = (N + 2 K) H
    attn_MX: Any
    act_MF: Any
    up_MF: Any
    logits_MV: Any
    squares: Any  # of the parts of h_MD: see product.cu, add
    out: Any  # of each stretch of positions: see attend.cu
    peaks: Any
    sums: Any
    best_peaks: Any  # of each part of the logits: see tokens.cu
    best_ids: Any
    best_sums: Any
    tokens_M: Any
    positions_M: Any
    records: Any  # (RECORDS, M, 2) float64
    count: Any


def buffers(config: Config, M: int, stretches: int) -> Buffers:
    """All of them, filled with zeros: the ends of rows stay so."""
    c, N, H = config, config.n_heads, config.head_dim
    f32, i32, f64 = np.float32, np.int32, np.float64

    def rows(width: int) -> Any:
        return cp.zeros((M, pitch_of(width)), f32)

    return Buffers(
        h_MD=rows(c.dim),
        qkv_MX=rows((N + 2 * c.n_kv_heads) * H),
        attn_MX=rows(N * H),
        act_MF=rows(c.ffn_dim),
        up_MF=rows(c.ffn_dim),
        logits_MV=cp.zeros((M, c.vocab_size), f32),
        squares=cp.zeros(M * -(-c.dim // WARPS), f32),
        out=cp.zeros((M, N, stretches, H), f32),
        peaks=cp.zeros((M, N, stretches), f32),
        sums=cp.zeros((M, N, stretches), f32),
        best_peaks=cp.zeros((M, PARTS), f32),
        best_ids=cp.zeros((M, PARTS), i32),
        best_sums=cp.zeros((M, PARTS), f64),
        tokens_M=cp.zeros(M, i32),
        positions_M=cp.full(M, -1, i32),
        records=cp.zeros((RECORDS, M, 2), f64),
        count=cp.zeros(1, i32),
    )


def _ending(method: Call) -> Call:
    """Make a method of Step wait for the device even if an exception ends it, be it Ctrl-C.

    What still ran would read the orders of the next step, and write to arrays that nobody holds
    any more.
    """

    @wraps(method)
    def waiting(step: Step, *args: Any) -> Any:
        try:
            return method(step, *args)
        except BaseException:
            step.stream.synchronize()
            raise

    return cast(Call, waiting)


class Step:
    """Steps over the arrays of one cache. One thread at a time.

    It keeps the arrays, and everything else that its graphs hold addresses of.
    """

    def __init__(self, model: Model, k: list[Any], v: list[Any]):
        (B, _, self.slots, _) = k[0].shape
        self.model, self.k, self.v, self.B = model, k, v, B
        self.M = next(batch for batch in BATCHES if batch >= B)
        self.stretches = -(-self.slots // STRETCH)
        self.buffers = buffers(model.config, self.M, self.stretches)
        self.tables = model.tables(self.slots)
        self.orders = Pinned((2, self.M), np.int32)
        self.logits = Pinned((self.M, model.config.vocab_size), np.float32)
        self.stream, self.pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
        self.before = cp.cuda.Event(disable_timing=True)
        self.sieve: Sieve | None = None  # once a token is drawn
        self.graphs: dict[tuple[bool, str], Any] = {}  # by how `_run` is called; None at first
        self.parts = 0  # of the sums of squares, as the last kernel left them

    # ---- what a caller does --------------------------------------------------------------------

    @_ending
    def forward(self, tokens_B: np.ndarray, positions_B: np.ndarray) -> np.ndarray:
        """Logits of one token a row, (B, V) on the host; a row of position -1 is left alone."""
        self._order(tokens_B, positions_B)
        self._run(ordered=True, then="copy")
        logits_BV = self.logits.host[: self.B]
        self.buffers.logits_MV[: self.B].get(stream=self.stream, out=logits_BV)  # waits for it
        return logits_BV.copy()

    @_ending
    def greedy(
        self, tokens_B: np.ndarray, positions_B: np.ndarray, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The n <= RECORDS most probable tokens that follow, and their log-probabilities, (n, B).

        Each is fed to get the next; the last is not. One that is no token, or a probability that
        is no number, means damaged logits.
        """
        self._order(tokens_B, positions_B)
        for i in range(n):
            self._run(ordered=i == 0, then="settle")
        records_nM2 = self.buffers.records[:n].get(stream=self.stream)
        with np.errstate(divide="ignore", invalid="ignore"):
            return records_nM2[:, : self.B, 0].astype(np.int64), -np.log(
                records_nM2[:, : self.B, 1]
            )

    @_ending
    def sample(
        self, tokens_B: np.ndarray, positions_B: np.ndarray, sampling: Sampling, numbers_B: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """The token of each row that follows, and its log-probability, (B,).

        Each is drawn with its row's random number. Raises InputError as sample.largest does.
        """
        if self.sieve is None:
            self.sieve = Sieve(self.B, self.model.config.vocab_size)
        self.sieve.order(sampling, numbers_B)
        self._order(tokens_B, positions_B)
        self._run(ordered=True, then="sift")
        return self.sieve.drawn(sampling, numbers_B, self.buffers.logits_MV, self.stream)

    # ---- the graph -------------------------------------------------------------------------------

    def _order(self, tokens_B: np.ndarray, positions_B: np.ndarray) -> None:
        self.orders.host[0], self.orders.host[1] = 0, -1
        self.orders.host[:, : self.B] = tokens_B, positions_B
        self.before.record()  # what the caller's stream does with the cache comes first
        self.stream.wait_event(self.before)

    def _run(self, ordered: bool, then: str) -> None:
        """At first launch by launch, which loads the kernels; then captured, then its graph.

        ordered: what comes in is what the host says, not what the last step chose. then: what
        becomes of the logits, "copy" for the host to take them all, "settle" or "sift".
        """
        kind = ordered, then
        with self.stream:
            if kind not in self.graphs:
                self._launches(*kind)
                self.graphs[kind] = None
                return
            if self.graphs[kind] is None:
                self.graphs[kind] = self._captured(*kind)
            self.graphs[kind].launch(self.stream)

    def _captured(self, ordered: bool, then: str) -> Any:
        with cp.cuda.using_allocator(self.pool.malloc):  # nothing of the common pool in a graph
            self.stream.begin_capture()
            try:
                self._launches(ordered, then)
            finally:
                graph = self.stream.end_capture()
        return graph

    # ---- the launches --------------------------------------------------------------------------

    def _launches(self, ordered: bool, then: str) -> None:
        if ordered:
            self._obey()
        self._step()
        if then != "copy":
            self._pick()
        if then == "settle":
            self._settle()
        if then == "sift" and self.sieve is not None:
            self.sieve.launches(self.buffers.logits_MV, **self._parts())

    def _step(self) -> None:
        params, b = self.model.params, self.buffers
        self._embed(params.embed_VD)
        for i, layer in enumerate(params.layers):
            self._attention(i, layer)
            self._feed_forward(i, layer)
        self._project([params.head_VD], self.model.norm, b.logits_MV)

    def _obey(self) -> None:
        b, orders = self.buffers, self.orders.device
        at = {"tokens": b.tokens_M, "positions": b.positions_M, "count": b.count}
        launch(registry.token_kernel("obey"), (1,), self.M, orders=orders, **at)

    def _embed(self, w: Any) -> None:
        b, (N, K) = self.buffers, w.shape
        launch(
            registry.row_kernel("embed", format_of(w)), (self.M,), 256,
            w=stored(w), N=N, K=K, tokens=b.tokens_M, h=b.h_MD, pitch=b.h_MD.shape[1],
            squares=b.squares,
        )  # fmt: skip
        self.parts = 1

    def _attention(self, i: int, layer: Layer) -> None:
        b, c = self.buffers, self.model.config
        heads, kv_heads, H = c.n_heads, c.n_kv_heads, c.head_dim
        self._project([layer.wq, layer.wk, layer.wv], self.model.norms[i][0], b.qkv_MX)
        turn, attend, combine = (
            registry.attention_kernel(entry, H, heads // kv_heads, self.k[i].dtype, c.rope_pairing)
            for entry in ("turn", "attend", "combine")
        )
        qkv = {"qkv": b.qkv_MX, "pitch": b.qkv_MX.shape[1], "positions": b.positions_M}
        kept = {"keys": self.k[i], "values": self.v[i], "K": kv_heads, "slots": self.slots}
        parts = {"out": b.out, "peaks": b.peaks, "sums": b.sums}
        cos_SP, sin_SP = self.tables
        launch(
            turn, (heads + 2 * kv_heads, self.B), 64,
            **qkv, **kept, N=heads, cos_SP=cos_SP, sin_SP=sin_SP,
        )  # fmt: skip
        shares = kv_heads * registry.query_shares(attend)
        launch(
            attend, (self.stretches, shares, self.B), 128,
            **qkv, **kept, **parts, scale=1 / sqrt(H),
        )  # fmt: skip
        launch(
            combine, (heads, self.B), 64,
            **parts, positions=b.positions_M, stretches=self.stretches, y=b.attn_MX,
            pitch=b.attn_MX.shape[1],
        )  # fmt: skip
        self._add(layer.wo, b.attn_MX)

    def _feed_forward(self, i: int, layer: Layer) -> None:
        b, norm, N = self.buffers, self.model.norms[i][1], layer.w_gate.shape[0]
        kernel = self._kernel("gate_up", layer.w_gate)
        if kernel == self._kernel("gate_up", layer.w_up):
            launch(
                kernel, (-(-N // registry.block_rows(kernel)),), WARPS * 32,
                gate=stored(layer.w_gate), up=stored(layer.w_up), N=N,
                **self._normed(norm), y=b.act_MF, y_pitch=b.act_MF.shape[1],
            )  # fmt: skip
        else:
            self._project([layer.w_gate], norm, b.act_MF)
            self._project([layer.w_up], norm, b.up_MF)
            sizes = {"N": N, "pitch": b.act_MF.shape[1]}
            grid = -(-N // 256), self.M
            launch(registry.SWIGLU, grid, 256, y=b.act_MF, other=b.up_MF, **sizes)
        self._add(layer.w_down, b.act_MF)

    def _kernel(self, entry: str, w: Any) -> registry.Kernel:
        return registry.weight_kernel(entry, format_of(w), aligned(w), self.M)

    def _normed(self, norm_P: Any) -> dict[str, Any]:
        """The arguments of a kernel that norms the residual stream as it reads it."""
        b, c = self.buffers, self.model.config
        vectors = {"x": b.h_MD, "x_pitch": b.h_MD.shape[1], "K": c.dim, "norm": norm_P}
        statistics = {"squares": b.squares, "parts": self.parts, "eps": c.norm_eps}
        return {**vectors, **statistics, "rounded": self.model.rounded}

    def _project(self, weights: list[Any], norm_P: Any, y_MX: Any) -> None:
        """Up to three products of the normed stream, side by side in y_MX: a launch a format."""
        starts = np.cumsum([0, *(w.shape[0] for w in weights)]).tolist()
        groups: dict[registry.Kernel, list[tuple[Any, int]]] = {}
        for w, start in zip(weights, starts, strict=False):
            groups.setdefault(self._kernel("project", w), []).append((w, start))
        for kernel, group in groups.items():
            blocks = sum(-(-w.shape[0] // registry.block_rows(kernel)) for w, _ in group)
            nothing = [(group[0][0], None)] * (3 - len(group))
            parts: dict[str, Any] = {}
            for j, (w, start) in enumerate([*group, *nothing]):
                rows = 0 if start is None else w.shape[0]
                parts |= {f"w{j}": stored(w), f"N{j}": rows, f"y{j}": start or 0}
            normed = self._normed(norm_P)
            launch(kernel, (blocks,), WARPS * 32, **parts, **normed, y=y_MX, y_pitch=y_MX.shape[1])

    def _add(self, w: Any, x_MX: Any) -> None:
        """Add a product to the residual stream."""
        b, (N, K), kernel = self.buffers, w.shape, self._kernel("add", w)
        blocks = -(-N // registry.block_rows(kernel))
        launch(
            kernel, (blocks,), WARPS * 32,
            w=stored(w), N=N, K=K, x=x_MX, x_pitch=x_MX.shape[1], rounded=self.model.rounded,
            y=b.h_MD, y_pitch=b.h_MD.shape[1], squares=b.squares,
        )  # fmt: skip
        self.parts = blocks * registry.square_parts(kernel)

    def _parts(self) -> dict[str, Any]:
        """What `pick` leaves of each part of the logits, but for the ids."""
        return {"peaks": self.buffers.best_peaks, "sums": self.buffers.best_sums}

    def _pick(self) -> None:
        b, V = self.buffers, self.model.config.vocab_size
        launch(
            registry.token_kernel("pick"), (PARTS, self.M), 256,
            logits=b.logits_MV, V=V, **self._parts(), ids=b.best_ids,
        )  # fmt: skip

    def _settle(self) -> None:
        b, V = self.buffers, self.model.config.vocab_size
        launch(
            registry.token_kernel("settle"), (1,), self.M * 32,
            **self._parts(), ids=b.best_ids, parts=PARTS, V=V, tokens=b.tokens_M,
            positions=b.positions_M, records=b.records, room=RECORDS, count=b.count,
        )  # fmt: skip
