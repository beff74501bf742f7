"""Wrong versions of the CUDA kernels: does a test fail for every one of them?

    python tests/mutants_cuda.py [WORD ...]     only mutants with these words in their names

Each is one edit of one source, whose text must be there exactly once, and is run with the test that
is there to notice it, in a process of its own; where a barrier is missing, by the executor that
sees races. Prints every mutant's fate; exits with 1 if one survives, or if the tests fail without
any edit. As a plugin of pytest (-p mutants_cuda) this file makes the edit that LLAMA3NP_MUTANT names.
"""
# ruff: noqa: E501  a mutant is a line, however long

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

KERNELS = "tests/test_cuda_kernels.py::test_"
# The same sizes at every run: examples that hypothesis draws may or may not be those that tell.
EDGES = KERNELS + "a_kernel_is_right_at_its_edges"
WIDENED = KERNELS + "every_16_bit_number_is_widened_exactly"
ROUNDED = KERNELS + "numbers_are_rounded_to_the_cache_as_numpy_does"
BY_HAND = KERNELS + "candidates_that_can_be_counted_by_hand"
SECONDS = 900  # a mutant that hangs is dead too


class Mutant(NamedTuple):
    """One edit, and the test that is to notice it."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = [
    # ---- numbers and warps
    Mutant("sum misses half of the lanes", "common.cu", "o = 16; o; o >>= 1) own +=", "o = 8; o; o >>= 1) own +=", EDGES + "[project-BF16-1]"),
    Mutant("largest misses half of the lanes", "common.cu", "o = 16; o; o >>= 1) own = fmaxf", "o = 8; o; o >>= 1) own = fmaxf", EDGES + "[attend]"),
    Mutant("bf16 truncated", "common.cu", "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16", "bits >> 16", EDGES + "[add-BF16-1]"),
    Mutant("bf16 ties up", "common.cu", "0x7fffu + (bits >> 16 & 1u)", "0x8000u", ROUNDED),
    Mutant("bf16 nan becomes infinite", "common.cu", "bits >> 16 | 0x40u", "0x7f80u", ROUNDED),
    Mutant("f16 truncated", "common.cu", "0xc8000fffu + (bits >> 13 & 1u)", "0xc8000000u", ROUNDED),
    Mutant("f16 subnormals by the normal way", "common.cu", "bits < 0x38800000u", "bits < 0x38000000u", ROUNDED),
    Mutant("f16 overflow to a number", "common.cu", "bits >= 0x47800000u", "bits > 0x7f800000u", ROUNDED),
    Mutant("f16 subnormals read by the normal way", "common.cu", "moved < (1u << 23)", "moved < 0u", WIDENED),
    Mutant("f16 infinity read as a number", "common.cu", "moved >= (31u << 23)", "moved > (63u << 23)", WIDENED),
    # ---- weights, one by one
    Mutant("Q5 high bits of another byte", "formats.cu", "(block[i % 32 / 8] >>", "(block[i % 32 / 16] >>", EDGES + "[widen-Q5_1]"),
    Mutant("Q4 nibbles exchanged", "formats.cu", "w[i / 32 * 16 + i % 16] >> (i % 32 / 16 * 4)", "w[i / 32 * 16 + i % 16] >> (4 - i % 32 / 16 * 4)", EDGES + "[widen-Q4_0]"),
    Mutant("Q3_K scale off by one", "formats.cu", "(int)scale - 32", "(int)scale - 31", EDGES + "[widen-Q3_K]"),
    Mutant("Q2_K minimum for scale", "formats.cu", "block[k % 256 / 16] >> 4;", "block[k % 256 / 16] & 15u;", EDGES + "[widen-Q2_K]"),
    Mutant("Q4_K minimum without its high bits", "formats.cu", "c >> 4 | b >> 6 << 4", "c >> 4", EDGES + "[widen-Q4_K]"),
    Mutant("Q6_K high pairs of another run", "formats.cu", "*high >> (2 * run)", "*high >> (run)", EDGES + "[widen-Q6_K]"),
    # ---- weights, 16 bytes at a time
    Mutant("Q4_0 nibbles exchanged in products", "pieces.cu", "j / 4 * 4), d, offset", "4 - j / 4 * 4), d, offset", EDGES + "[project-Q4_0-1]"),
    Mutant("Q8_0 unsigned", "pieces.cu", " ^ 0x80808080u", "", EDGES + "[project-Q8_0-8]"),
    Mutant("Q8_0 scale of the first half", "pieces.cu", "from_f16(p.d[j / 4])", "from_f16(p.d[0])", EDGES + "[project-Q8_0-8]"),
    Mutant("Q4_K minimum added", "pieces.cu", "scale, -minimum", "scale, minimum", EDGES + "[project-Q4_K-1]"),
    Mutant("Q4_K scale of the low nibbles for both", "pieces.cu", "lane % 8 / 2 * 2 + j / 4,", "lane % 8 / 2 * 2,", EDGES + "[project-Q4_K-1]"),
    Mutant("Q6_K runs 1 and 2 exchanged", "pieces.cu", "+ j % 2) >> (run / 2 * 4)", "+ j % 2) >> (run % 2 * 4)", EDGES + "[project-Q6_K-8]"),
    Mutant("16-bit rows read one load too far", "pieces.cu", "lane * 8;\n    p.v[u] = k < K", "lane * 8;\n    p.v[u] = k <= K", EDGES + "[project-BF16-1]"),
    Mutant("ragged tail dropped", "pieces.cu", "k + 2 < K", "k + 3 < K", KERNELS + "project_reads_rows_that_end_anywhere[F32]"),
    Mutant("four vectors' numbers at other places", "pieces.cu", "f / 64 * 2 + f % 2) * PITCH", "f / 64 * 2 + (f + 1) % 2) * PITCH", EDGES + "[project-BF16-4]"),
    # ---- products
    Mutant("one row too many read", "product.cu", "n < rows.N ? K : 0", "n <= rows.N ? K : 0", EDGES + "[project-BF16-1]"),
    Mutant("one row too many written", "product.cu", "n < rows.N) y[", "n <= rows.N) y[", EDGES + "[project-Q4_K-4]"),
    Mutant("no barrier before a tile is read", "product.cu", "tile);\n    __syncthreads();\n    load_rows", "tile);\n    load_rows", EDGES + "[project-BF16-1]"),
    Mutant("no barrier before a tile is overwritten", "product.cu", "    }\n    __syncthreads();\n#pragma", "    }\n#pragma", EDGES + "[add-BF16-1]"),
    Mutant("next tile not taken over", "product.cu", "now[r] = next[r];", "now[r] = now[r];", EDGES + "[add-BF16-1]"),
    Mutant("eps dropped", "product.cu", "(float)K + eps", "(float)K", EDGES + "[project-BF16-1]"),
    Mutant("last sum of squares dropped", "product.cu", "i < parts; i += 32", "i < parts - 1; i += 32", EDGES + "[project-BF16-2]"),
    Mutant("weight of the norm dropped", "product.cu", "x.z * s * w.z", "x.z * s", EDGES + "[project-BF16-1]"),
    Mutant("scale of the first row for all", "product.cu", "float s = scale[m];", "float s = scale[0];", EDGES + "[project-BF16-2]"),
    Mutant("activations not rounded", "product.cu", "if (v.rounded)", "if (false)", EDGES + "[add-BF16-1]"),
    Mutant("second weight where the first is", "product.cu", "start = y1,", "start = y0,", EDGES + "[project-BF16-1]"),
    Mutant("third weight read as the second", "product.cu", "rows.a = w2,", "rows.a = w1,", EDGES + "[project-Q4_K-1]"),
    Mutant("gate and up exchanged", "product.cu", "gated(own, other)", "gated(other, own)", EDGES + "[gate_up-BF16-1]"),
    Mutant("silu without its sign", "product.cu", "expf(-gate)", "expf(gate)", EDGES + "[gate_up-Q8_0-8]"),
    Mutant("residual overwritten", "product.cu", "    sum += y[(size_t)m * y_pitch + n];\n", "", EDGES + "[add-BF16-1]"),
    Mutant("squares of the first sixteen rows twice", "product.cu", "own_squares[group * WARPS + i]", "own_squares[i]", EDGES + "[add-Q4_K-4]"),
    Mutant("one row of a pair not squared", "product.cu", "  square += __shfl_xor_sync(ALL_LANES, square, BATCH);", " ", EDGES + "[add-BF16-8]"),
    # ---- embedding
    Mutant("last number of an embedding dropped", "rows.cu", "k < K; k += blockDim.x) {", "k < K - 1; k += blockDim.x) {", EDGES + "[embed-F32]"),
    Mutant("last warp's squares dropped", "rows.cu", "i < 8; i++", "i < 7; i++", EDGES + "[embed-BF16]"),
    # ---- attention of a step
    Mutant("current token not seen", "attend.cu", "position + 1 - first", "position - first", EDGES + "[attend]"),
    Mutant("one position too many seen", "attend.cu", "position + 1 - first", "position + 2 - first", EDGES + "[attend]"),
    Mutant("a stretch of one position dropped", "attend.cu", "first > position", "first >= position", EDGES + "[attend]"),
    Mutant("scores not scaled", "attend.cu", "HEAD + d] * scale", "HEAD + d]", EDGES + "[attend]"),
    Mutant("keys of another head", "attend.cu", "kv = blockIdx.y / shares", "kv = blockIdx.y % shares", EDGES + "[attend]"),
    Mutant("queries of another group", "attend.cu", "n0 = kv * GROUP + g0", "n0 = kv + g0 * K", EDGES + "[attend]"),
    Mutant("no barrier before scores are softened", "attend.cu", "count);\n  __syncthreads();\n  soften", "count);\n  soften", EDGES + "[attend]"),
    Mutant("no barrier before powers are read", "attend.cu", "gridDim.x);\n  __syncthreads();", "gridDim.x);", EDGES + "[attend]"),
    Mutant("no barrier before groups are added", "attend.cu", "values + at, count);\n  __syncthreads();", "values + at, count);", EDGES + "[attend]"),
    Mutant("score misses half of the lanes", "attend.cu", "o = LANES / 2; o", "o = LANES / 4; o", EDGES + "[attend]"),
    Mutant("last group of lanes dropped", "attend.cu", "group < GROUPS; group++", "group < GROUPS - 1; group++", EDGES + "[attend]"),
    Mutant("power not relative to the largest", "attend.cu", "expf(scores[g][i] - peak)", "expf(scores[g][i])", EDGES + "[attend]"),
    Mutant("stretches put together unscaled", "attend.cu", "HEAD + d] * expf(peaks[first + i] - peak)", "HEAD + d]", EDGES + "[combine]"),
    Mutant("last stretch forgotten", "attend.cu", "(positions[m] + STRETCH) / STRETCH", "(positions[m] + STRETCH - 1) / STRETCH", EDGES + "[combine]"),
    Mutant("turned the other way", "attend.cu", "a * c - b * s", "a * c + b * s", EDGES + "[turn]"),
    Mutant("wrong pairing", "attend.cu", "PAIRING ? p : 2 * p", "PAIRING ? 2 * p : p", EDGES + "[turn]"),
    Mutant("angle of the position before", "attend.cu", "cos_SP[(size_t)position *", "cos_SP[(size_t)max(position - 1, 0) *", EDGES + "[turn]"),
    Mutant("keys and values exchanged", "attend.cu", "      values[(row", "      keys[(row", EDGES + "[turn]"),
    Mutant("idle row written", "attend.cu", "  if (position < 0) return;\n", "", EDGES + "[turn]"),
    Mutant("row of the cache is always the first", "attend.cu", "size_t row = (size_t)m * K +", "size_t row =", EDGES + "[turn]"),
    # ---- attention of prefill
    Mutant("query does not see itself", "prefill.cu", "eighth > own.sees[i]", "eighth >= own.sees[i]", EDGES + "[attend_block]"),
    Mutant("query sees its successor", "prefill.cu", "eighth > own.sees[i]", "eighth > own.sees[i] + 1", EDGES + "[attend_block]"),
    Mutant("sums not shrunk", "prefill.cu", "sums[i][e] *= shrink;", "sums[i][e] *= 1.f;", EDGES + "[attend_block]"),
    Mutant("total not shrunk", "prefill.cu", "total[i] * shrink +", "total[i] +", EDGES + "[attend_block]"),
    Mutant("no barrier between keys and values", "prefill.cu", "    __syncthreads();  // keys are done with, powers are there\n", "", EDGES + "[attend_block]"),
    Mutant("last position of a block not read", "prefill.cu", "own_positions[last_t] + 1)", "own_positions[last_t])", EDGES + "[attend_block]"),
    Mutant("keys of the first head", "prefill.cu", "cached = (size_t)(b * K + kv) * step", "cached = (size_t)(b * K) * step", EDGES + "[attend_block]"),
    Mutant("mean not divided", "prefill.cu", "own.sums[i][e] / own.total[i]", "own.sums[i][e]", EDGES + "[attend_block]"),
    Mutant("last query not written", "prefill.cu", "if (r < T * G && e", "if (r < T * G - 1 && e", EDGES + "[attend_block]"),
    # ---- choosing
    Mutant("highest id of equal ones", "tokens.cu", "b.id < a.id", "b.id > a.id", EDGES + "[pick]"),
    Mutant("last vocabulary id never chosen", "tokens.cu", "min(V, start + size), warp", "min(V - 1, start + size), warp", EDGES + "[pick]"),
    Mutant("remainder of the vocabulary dropped", "tokens.cu", "(V + parts - 1) / parts;\n  int start = blockIdx.x * size, stop = min(V, start + size), warp", "V / parts;\n  int start = blockIdx.x * size, stop = min(V, start + size), warp", EDGES + "[pick]"),
    Mutant("sums of parts not brought together", "tokens.cu", " * (double)expf(peaks[m * parts + i] - own.peak)", "", EDGES + "[settle]"),
    Mutant("stale position", "tokens.cu", "    positions[m] += 1;\n", "", EDGES + "[settle]"),
    Mutant("idle row goes on", "tokens.cu", "if (positions[m] >= 0) {", "if (true) {", EDGES + "[settle]"),
    Mutant("records not counted", "tokens.cu", "*count = done + 1", "*count = done", EDGES + "[settle]"),
    Mutant("position ordered of another row", "tokens.cu", "orders[blockDim.x + m]", "orders[blockDim.x]", EDGES + "[obey]"),
    Mutant("count not begun anew", "tokens.cu", "  if (m == 0) *count = 0;\n", "", EDGES + "[obey]"),
    # ---- drawing
    Mutant("draw: powers not divided by the temperature", "tokens.cu", "(double)peak) / temperature)", "(double)peak))", EDGES + "[weigh]"),
    Mutant("draw: powers relative to nothing", "tokens.cu", "((double)row[i] - (double)peak)", "((double)row[i])", EDGES + "[weigh]"),
    Mutant("draw: power of a part's last id dropped", "tokens.cu", "    sum += exp((", "    if (i < stop - 1) sum += exp((", EDGES + "[weigh]"),
    Mutant("draw: powers of a part's last warp dropped", "tokens.cu", "i < THREADS / 32; i++) total += own_sums[i]", "i < THREADS / 32 - 1; i++) total += own_sums[i]", EDGES + "[weigh]"),
    Mutant("draw: no barrier before bins are counted", "tokens.cu", "bins[b] = 0;\n  __syncthreads();", "bins[b] = 0;", EDGES + "[weigh]"),
    Mutant("draw: counts of the first part for all", "tokens.cu", "counts[(first + i) * BINS", "counts[first * BINS", EDGES + "[sift]"),
    Mutant("draw: one fewer than the k largest", "tokens.cu", "(double)V - k;", "(double)V - k + 1.0;", BY_HAND),
    Mutant("draw: top-p drops what adds up to p", "tokens.cu", "(1.0 - p - 0x1p-36)", "(p - 0x1p-36)", BY_HAND),
    Mutant("draw: powers of a bin not multiplied by their number", "tokens.cu", "(double)count * (wish[1] > 0.0 ? 1.0 :", "(wish[1] > 0.0 ? (double)count :", BY_HAND),
    Mutant("draw: a bin's own weight counted as beyond it", "tokens.cu", "double beyond = __shfl_down_sync(ALL_LANES, weight, 1);", "double beyond = weight;", BY_HAND),
    Mutant("draw: bins of later warps forgotten", "tokens.cu", "for (int i = warp + 1; i < BINS / 32; i++) beyond", "for (int i = warp + 1; i < warp; i++) beyond", BY_HAND),
    Mutant("draw: no barrier before the last bin is read", "tokens.cu", "atomicMin(&cut->last, bin);\n  __syncthreads();", "atomicMin(&cut->last, bin);", EDGES + "[sift]"),
    Mutant("draw: bins of other widths", "tokens.cu", "(peak - logit) * 32.f", "(peak - logit) * 31.f", BY_HAND),
    Mutant("draw: part after that of the random number", "tokens.cu", "upto <= wish[3] * total", "upto <= (wish[3] + 0.1) * total", BY_HAND),
    Mutant("draw: sum before the part not told", "tokens.cu", "facts[4] = before;", "facts[4] = 0.0;", EDGES + "[sift]"),
    Mutant("draw: sum of the model itself unscaled", "tokens.cu", "sums[i] * (double)expf(peaks[i] - cut.peak)", "sums[i]", EDGES + "[sift]"),
    Mutant("draw: a lane's own candidate counted before it", "tokens.cu", "(1u << lane) - 1)", "(2u << lane) - 1)", EDGES + "[sift]"),
    Mutant("draw: candidates of warps on top of each other", "tokens.cu", "if (i == warp) place = found;", "if (i == 0) place = found;", EDGES + "[sift]"),
    Mutant("draw: last id of a row dropped", "tokens.cu", "stop = min(cut.stop, start + size);", "stop = min(cut.stop - 1, start + size);", EDGES + "[sift]"),
    Mutant("draw: more written than there is room for", "tokens.cu", "if (found > room) return;", "if (found > 2 * room) return;", KERNELS + "candidates_for_which_there_is_no_room_are_counted"),
    Mutant("draw: wishes of the first row for all", "tokens.cu", "wish = wishes + m * WISHES", "wish = wishes", BY_HAND),
]  # fmt: skip


def pytest_sessionstart():
    """Let kernels be made of edited sources; conftest.py has put the software device in place."""
    if (name := os.environ.get("LLAMA3NP_MUTANT")) is None:
        return
    from llama3np.kernels.cuda import registry

    mutant, text = next(m for m in MUTANTS if m.name == name), registry._text
    registry._text = lambda file: edited(mutant, text(file)) if file == mutant.file else text(file)


def edited(mutant, source):
    """The source with the edit made."""
    assert source.count(mutant.old) == 1, f"{mutant.name}: {source.count(mutant.old)} places"
    return source.replace(mutant.old, mutant.new)


def run(tests, name=None):
    """pytest's exit status for these tests, under the mutant of this name."""
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "CI": "1"}
    env |= {"LLAMA3NP_MUTANT": name} if name else {}
    env |= {"SOFTCUDA_EXECUTOR": "ptx"} if name and "barrier" in name else {}
    quiet = ["-x", "-q", "-p", "mutants_cuda", "-p", "no:cacheprovider", "--tb=no"]
    command = [sys.executable, "-m", "pytest", *quiet, *tests]
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return -1
    return done.returncode


def main(words):
    """Run the mutants whose names have one of the words, or all."""
    folder = Path(__file__).parents[1] / "llama3np" / "kernels" / "cuda"
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    for mutant in chosen:
        edited(mutant, (folder / mutant.file).read_text(encoding="utf-8"))
    if (status := run(sorted({mutant.test for mutant in chosen}))) != 0:
        print(f"the tests fail without any edit (exit status {status})")
        return 1
    survivors = []
    for mutant in chosen:
        status = run([mutant.test], mutant.name)
        killed = status == 1 or status < 0  # a failed test, or a crash; not: no test, a bad option
        survivors += [] if killed else [mutant.name]
        print(f"{'killed  ' if killed else 'SURVIVES'} {mutant.name} ({mutant.file})", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    for name in survivors:
        print(f"survivor: {name}")
    return int(bool(survivors))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
