"""Mutations that are edits of the spec's source text: see mutations.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llama3np.crosscheck.mutations import Case, Edit, Mutation, Setting, edit, edits

# ---- RoPE ----------------------------------------------------------------------------------------

TABLES = "rope_tables(config, window.positions_BT, dtype)"
ANGLES = "positions_BT[:, :, None].astype(dtype) * xp.asarray(freq_P)"
COS_SIN = "return xp.cos(angles_BTP), xp.sin(angles_BTP)"
TURN_Q, TURN_K = 'see("q_rope", turn(q_BTNH))', 'see("k_rope", turn(k_BTKH))'
WRITE = "write(k_rope_BTKH, v_BTKH)"


def at(positions: str) -> Edit:
    """RoPE's tables of other positions; the mask and the cache keep theirs."""
    return Edit(TABLES, f"rope_tables(config, {positions}, dtype)")


def restarted(run: Setting) -> Iterator[Case]:
    """Positions that begin again where the prompt ends."""
    here = "window.positions_BT"
    if run.prefill < len(run.ids):
        yield "every call counts from 0", run.edited(at(f"{here} - {here}[:, :1]"))
        first = f"{run.prefill} * ({here} >= {run.prefill})"
        yield "decoding counts on from 0", run.edited(at(f"{here} - {first}"))


def shifted(run: Setting) -> Iterator[Case]:
    """Positions of decoded tokens that are one off against the prompt's."""
    here = "window.positions_BT"
    if run.prefill < len(run.ids):
        yield "one too far", run.edited(at(f"{here} + ({here} >= {run.prefill})"))
        yield "one too near", run.edited(at(f"{here} - ({here} >= {run.prefill})"))


def linear_scaling(run: Setting) -> Iterator[Case]:
    """All positions divided by a factor: the config's, or the usual ones where it has none."""
    scaling = run.config.rope_scaling
    plain = run._replace(config=replace(run.config, rope_scaling=None))
    for factor in (2.0, 4.0, 8.0, 32.0) if scaling is None else (scaling.factor,):
        yield (
            f"factor {factor:g}",
            plain.edited(Edit(ANGLES, f"{ANGLES} / {factor:g}")),
        )


ROPE = (
    edit(
        "positions-from-one",
        "Positions count from 1, so every token is turned by one angle too many",
        at("window.positions_BT + 1"),
    ),
    Mutation(
        "positions-restart-at-decode",
        "Positions of decode steps begin at 0 again, where they go on from the prompt's",
        restarted,
    ),
    Mutation(
        "positions-off-by-one-at-decode",
        "Positions of decode steps are one off against those of the prompt",
        shifted,
    ),
    Mutation(
        "rope-scaling-linear",
        "RoPE's positions are divided by a factor, where this checkpoint stretches only long waves",
        linear_scaling,
    ),
    edits(
        "angles-bf16",
        "RoPE's angles are computed in bfloat16, which has 8 bits; they need float32",
        {
            "the frequencies": (Edit(ANGLES, f'{ANGLES}.astype("bfloat16").astype(dtype)'),),
            "positions, frequencies and products": (
                Edit(
                    ANGLES,
                    '(positions_BT[:, :, None].astype("bfloat16") '
                    '* xp.asarray(freq_P).astype("bfloat16")).astype(dtype)',
                ),
            ),
            "the products": (Edit(ANGLES, f'({ANGLES}).astype("bfloat16").astype(dtype)'),),
        },
    ),
    edit(
        "rope-tables-bf16",
        "RoPE's cosines and sines are rounded to bfloat16",
        Edit(
            COS_SIN,
            "return tuple(f(angles_BTP).astype('bfloat16').astype(dtype) "
            "for f in (xp.cos, xp.sin))",
        ),
    ),
    edit(
        "rope-backwards",
        "RoPE turns by the negative angle: (a cos + b sin, b cos - a sin)",
        Edit(COS_SIN, "return xp.cos(angles_BTP), -xp.sin(angles_BTP)"),
    ),
    edit(
        "rope-missing",
        "RoPE is applied to neither queries nor keys",
        Edit(TURN_Q, 'see("q_rope", q_BTNH)'),
        Edit(TURN_K, 'see("k_rope", k_BTKH)'),
    ),
    edit(
        "rope-only-on-q",
        "RoPE is applied to the queries, and not to the keys",
        Edit(TURN_K, 'see("k_rope", k_BTKH)'),
    ),
    edit(
        "rope-only-on-k",
        "RoPE is applied to the keys, and not to the queries",
        Edit(TURN_Q, 'see("q_rope", q_BTNH)'),
    ),
    edit(
        "rope-on-v",
        "RoPE is applied to the values too",
        Edit(WRITE, "write(k_rope_BTKH, turn(v_BTKH))"),
    ),
    edit(
        "rope-twice-on-cached-keys",
        "Keys are turned before the cache, and what comes from the cache is turned again",
        Edit(WRITE, "write(turn(k_rope_BTKH), v_BTKH)"),
    ),
)

# ---- attention -----------------------------------------------------------------------------------

SCALED = "widen(raw_BKGTS) * H**-0.5"
VISIBLE = "visible_B11TS = xp.arange(S) <= positions_BT[:, None, None, :, None]"
HIDDEN = "* H**-0.5, -inf), q_BTNH)"
SLOTS = "slots_M=xp.asarray(positions_BT[rows_M, columns_M]),"
SIZE = "size=max(int((self.lengths_B + new_B).max()), 1),"
PROBS = "probs_BKGTS = narrow(powers_BKGTS / powers_BKGTS.sum(axis=-1, keepdims=True), q_BTNH)"
# A query that sees nothing: the lowest number in place of -inf gives all keys the same weight.
LOWEST = Edit(HIDDEN, "* H**-0.5, -6e4), q_BTNH)")


def scaled_by_width(run: Setting) -> Iterator[Case]:
    """1/sqrt(D) for 1/sqrt(H), if they differ."""
    if run.config.dim != run.config.head_dim:
        yield "", run.edited(Edit(SCALED, f"widen(raw_BKGTS) * {run.config.dim}**-0.5"))


def slots(what: str) -> tuple[Edit, ...]:
    """Where decode steps write their keys and values; a prompt's stay where they are."""
    new = f"slots_M=xp.asarray({what})[rows_M, columns_M],"
    return (Edit(SLOTS, new, "cache"),)


def misplaced(what: str, **others: str):
    """A form or several for each run that has decode steps; {prefill} is where they begin."""

    def cases(run: Setting) -> Iterator[Case]:
        for form, places in {"": what, **others}.items():
            if run.prefill < len(run.ids):
                yield form, run.edited(*slots(places.format(prefill=run.prefill)))

    return cases


def prefill_mask(run: Setting) -> Iterator[Case]:
    """No mask while decoding: a cache of the run's length is seen whole."""
    if run.prefill < len(run.ids):
        whole = f"size={len(run.ids)} if self.lengths_B.any() else {SIZE.removeprefix('size=')}"
        yield (
            "",
            run.edited(
                Edit(VISIBLE, VISIBLE.replace("= xp", "= (S > T) | (xp", 1) + ")"),
                Edit(SIZE, whole, "cache"),
            ),
        )


ATTENTION = (
    edit(
        "scale-missing",
        "Scores are not multiplied by 1/sqrt(H)",
        Edit(SCALED, "widen(raw_BKGTS)"),
    ),
    Mutation(
        "scale-by-width",
        "Scores are multiplied by 1/sqrt(D), of the model's width, in place of the head's size",
        scaled_by_width,
    ),
    edit(
        "scale-twice",
        "Scores are multiplied by 1/sqrt(H) twice",
        Edit(SCALED, "widen(raw_BKGTS) * H**-1"),
    ),
    edit(
        "softmax-over-queries",
        "The softmax runs over the queries, where it runs over the keys that a query sees",
        Edit("widen(scores_BKGTS.max(axis=-1, ", "widen(scores_BKGTS.max(axis=-2, "),
        Edit(PROBS, PROBS.replace("axis=-1", "axis=-2")),
    ),
    edit(
        "mask-missing",
        "There is no causal mask: a token sees those after it",
        Edit(VISIBLE, "visible_B11TS = xp.arange(S) >= 0"),
    ),
    edit(
        "mask-sees-next",
        "The causal mask is one off: a token sees the next one",
        Edit(VISIBLE, f"{VISIBLE} + 1"),
    ),
    edits(
        "mask-hides-self",
        "The causal mask is one off: a token does not see itself (the first one sees all alike)",
        {
            "in every call": (Edit(VISIBLE, VISIBLE.replace("<=", "<")), LOWEST),
            "in the prompt only": (
                Edit(VISIBLE, VISIBLE.replace("<=", "<") + " + (S > T)"),
                LOWEST,
            ),
        },
    ),
    Mutation(
        "mask-only-in-prefill",
        "Decode steps have no mask: they see the slots of the cache not yet written, all zeros",
        prefill_mask,
    ),
    edit(
        "heads-tiled",
        "Query head n reads key/value head n mod K (tile), where it reads n div G (repeat)",
        Edit(
            "ops.attention(q_rope_BTNH, k_BKSH, v_BKSH,",
            "ops.attention(q_rope_BTNH, np.tile(k_BKSH, (1, config.group, 1, 1)), "
            "np.tile(v_BKSH, (1, config.group, 1, 1)),",
        ),
    ),
    edit(
        "kv-swapped",
        "Attention takes the cache's values for keys, and its keys for values",
        Edit("k_BKSH, v_BKSH = write(", "v_BKSH, k_BKSH = write("),
    ),
    Mutation(
        "cache-hole",
        "Decode steps write one slot too late: the slot after the prompt stays zero, and is seen",
        misplaced(
            "positions_BT + (positions_BT >= {prefill})",
            # Only the first one is lost: it goes to the last slot of all, which nobody sees.
            once="np.where(positions_BT == {prefill}, self.max_seq_len - 1, positions_BT)",
        ),
    ),
    Mutation(
        "cache-overwritten",
        "Decode steps write one slot too early: they overwrite the token before them",
        misplaced("positions_BT - (positions_BT >= {prefill})"),
    ),
    Mutation(
        "cache-slot-stuck",
        "Every decode step writes to the one slot after the prompt",
        misplaced("np.minimum(positions_BT, {prefill})"),
    ),
)

# ---- norms, feed-forward, residual stream --------------------------------------------------------

NORM = "return narrow(wide_BTD * scale_BT1, x_BTD) * w_D"
SQUARES = "(wide_BTD * wide_BTD).mean(axis=-1, keepdims=True)"
SILU = "return narrow(widen(gate_BTF) / (1 + xp.exp(-bounded_BTF)), gate_BTF) * up_BTF"
ADD_ATTENTION, ADD_MLP = 'see("h_mid", h_BTD + out_BTD)', 'see("h", h_mid_BTD + see('
EMBED = ".astype(dtype, copy=False))"
FROM_X = Edit(ADD_ATTENTION, 'see("h_mid", x_BTD + out_BTD)')
FROM_Y = Edit(ADD_MLP, 'see("h", y_BTD + see(')

STREAM = (
    edit(
        "norm-weight-missing",
        "RMSNorm does not multiply by its weight",
        Edit(NORM, "return narrow(wide_BTD * scale_BT1, x_BTD)"),
    ),
    edit(
        "norm-weight-plus-one",
        "RMSNorm multiplies by 1 + weight, as Gemma does",
        Edit(NORM, "return narrow(wide_BTD * scale_BT1, x_BTD) * (1 + w_D)"),
    ),
    edit(
        "norm-weight-before-cast",
        "RMSNorm multiplies by its weight in float32 and rounds once, where it rounds before too",
        Edit(NORM, "return narrow(wide_BTD * scale_BT1 * widen(w_D), x_BTD)"),
    ),
    edit(
        "f16-overflow",
        "RMSNorm squares in float16, which ends at 65504: numbers above 255 become infinite",
        Edit(
            SQUARES,
            SQUARES.replace(").mean", ").astype('float16').mean") + ".astype(wide_BTD.dtype)",
        ),
    ),
    edit(
        "final-norm-missing",
        "The last RMSNorm, before the head, is missing",
        Edit("ops.rms_norm(h_BTD[wanted], params.norm_D, config.norm_eps)", "h_BTD[wanted]"),
    ),
    edit(
        "gate-up-swapped",
        "silu is applied to the up projection, where it is to the gate",
        Edit("ops.swiglu(gate_BTF, up_BTF)", "ops.swiglu(up_BTF, gate_BTF)"),
    ),
    edit(
        "gelu-tanh",
        "The activation is GELU (tanh form), where it is SiLU",
        Edit(
            SILU,
            "g_BTF = widen(gate_BTF); return narrow(g_BTF * (1 + xp.tanh((2 / pi) ** 0.5 "
            "* (g_BTF + 0.044715 * g_BTF**3))) / 2, gate_BTF) * up_BTF",
        ),
    ),
    edit(
        "gelu-exact",
        "The activation is GELU (erf form), where it is SiLU",
        Edit("from math import inf, pi", "from math import erf, inf, pi"),
        Edit(
            SILU,
            "g_BTF = widen(gate_BTF); return narrow(g_BTF * (1 + np.frompyfunc(erf, 1, 1)"
            "(g_BTF / 2**0.5).astype(g_BTF.dtype)) / 2, gate_BTF) * up_BTF",
        ),
    ),
    edit(
        "relu",
        "The activation is ReLU, where it is SiLU",
        Edit(SILU, "return xp.maximum(gate_BTF, 0) * up_BTF"),
    ),
    edits(
        "residual-from-norm",
        "The residual connection adds to the normed stream, where it adds to the stream itself",
        {
            "after attention": (FROM_X,),
            "after the feed-forward": (FROM_Y,),
            "after both": (FROM_X, FROM_Y),
        },
    ),
    edits(
        "residual-missing",
        "A residual connection is missing",
        {
            "after attention": (Edit(ADD_ATTENTION, 'see("h_mid", out_BTD)'),),
            "after the feed-forward": (Edit(ADD_MLP, 'see("h", see('),),
        },
    ),
    edit(
        "embedding-scaled",
        "The embedding is multiplied by sqrt(D), as Gemma's is",
        Edit(EMBED, f"{EMBED.removesuffix(')')} * config.dim**0.5)"),
    ),
)

# ---- 16 bits -------------------------------------------------------------------------------------

CUT = "llama3np.crosscheck.mutant import cut as narrow"  # in place of backend.narrow
TRUNCATION = edit(
    "bf16-truncated",
    "Results are cut to bfloat16, where they are rounded to the nearest",
    Edit("host_ids, namespace, narrow, widen", f"host_ids, namespace, widen\nfrom {CUT}"),
    Edit(NORM, "return narrow(widen(narrow(wide_BTD * scale_BT1, x_BTD)) * widen(w_D), x_BTD)"),
    Edit(
        "a_BTNP, b_BTNP = x_BTNH[..., first], x_BTNH[..., second]",
        "a_BTNP, b_BTNP = widen(x_BTNH[..., first]), widen(x_BTNH[..., second])",
    ),
    Edit(
        "cos_BT1P, sin_BT1P = cos_BTP[:, :, None], sin_BTP[:, :, None]",
        "cos_BT1P, sin_BT1P = widen(cos_BTP[:, :, None]), widen(sin_BTP[:, :, None])",
    ),
    Edit(
        "a_BTNP * cos_BT1P - b_BTNP * sin_BT1P",
        "narrow(a_BTNP * cos_BT1P - b_BTNP * sin_BT1P, x_BTNH)",
    ),
    Edit(
        "a_BTNP * sin_BT1P + b_BTNP * cos_BT1P",
        "narrow(a_BTNP * sin_BT1P + b_BTNP * cos_BT1P, x_BTNH)",
    ),
    Edit(
        SILU,
        "return narrow(widen(narrow(widen(gate_BTF) / (1 + xp.exp(-bounded_BTF)), gate_BTF)) "
        "* widen(up_BTF), gate_BTF)",
    ),
    Edit(ADD_ATTENTION, 'see("h_mid", narrow(widen(h_BTD) + widen(out_BTD), h_BTD))'),
    Edit(
        'see("h", h_mid_BTD + see("mlp_out", ops.linear(act_BTF, layer.w_down)))',
        'see("h", narrow(widen(h_mid_BTD) + widen(see("mlp_out", '
        "ops.linear(act_BTF, layer.w_down))), h_BTD))",
    ),
)

TABLE = (*ROPE, *ATTENTION, *STREAM, TRUNCATION)
