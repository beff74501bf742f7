"""Translate the PTX that NVRTC really emits into C++ for the cudaemu fiber engine (no GPU, no driver).

Every load and store goes through a checking function (ptx_prelude.h), so out-of-bounds and misaligned accesses
and shared-memory overruns are reported: a small memcheck.  Unsupported raises, so that the caller can use the source instead:
`.func` calls, mma, ldmatrix, cp.async, TMA, textures.
"""

import os
import re


class Unsupported(Exception):
    """PTX that this translator does not know."""


# PTX type -> width in bits, C++ type;  register width -> C++ type
W = {f"{kind}{n}": n for n in (8, 16, 32, 64) for kind in "bus"}
W |= {"pred": 1, "f16": 16, "bf16": 16, "f32": 32, "f16x2": 32, "bf16x2": 32, "f64": 64, "b128": 128}
CT = {f"{kind}{n}": f"{'' if kind == 's' else 'u'}int{n}_t" for n in (8, 16, 32, 64) for kind in "bus"}
CT |= {"f32": "float", "f64": "double", "f16": "_h", "bf16": "_bf"}
RT = {1: "bool", 8: "uint8_t", 16: "uint16_t", 32: "uint32_t", 64: "uint64_t"}
FLOATS = ("f32", "f64", "f16", "bf16")
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "emulator", "ptx_prelude.h")) as _f:
    PRE = _f.read()


def split_ops(s):
    """Split operands at commas outside brackets."""
    out, d, cur = [], 0, ""
    for c in s:
        if c in "{[(":
            d += 1
        if c in "}])":
            d -= 1
        if c == "," and d == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += c
    if cur.strip():
        out.append(cur.strip())
    return out


class Fn:
    """One .entry function: its registers, memory and the C++ lines emitted so far."""

    def __init__(s, name, params, mod):
        s.name, s.params, s.mod = name, params, mod
        s.regs, s.code, s.shared, s.local, s.sync = {}, [], {}, [], False

    def reg(s, n):
        """C++ name of a register."""
        return "R_" + re.sub(r"\W", "_", n)

    def width(s, n):
        """Bits of a register."""
        if n in s.regs:
            return s.regs[n]
        raise Unsupported("register " + n)

    def val(s, o, t):
        """An operand as a C++ expression of PTX type t."""
        o = o.strip()
        if t == "pred":
            return "!" + s.reg(o[1:]) if o[0] == "!" else s.reg(o)
        if o.startswith("{"):
            parts = [
                s.val(x, {32: "u16", 64: "u32"}[W[t]] if len(split_ops(o[1:-1])) == 2 else "u8")
                for x in split_ops(o[1:-1])
            ]
            w = W[t] // len(parts)
            return (
                "("
                + " | ".join(f"((uint{W[t]}_t)(uint{w}_t)({p}) << {i * w})" for i, p in enumerate(parts))
                + ")"
            )
        sp = {"%tid": "threadIdx", "%ntid": "blockDim", "%ctaid": "blockIdx", "%nctaid": "gridDim"}
        m = re.match(r"(%n?(?:tid|ctaid))\.([xyz])$", o)
        if m:
            return f"{sp[m.group(1)]}.{m.group(2)}"
        if o == "%laneid":
            return "(uint32_t)(emu::C.cur&31)"
        if o == "%warpid":
            return "(uint32_t)(emu::C.cur>>5)"
        if re.match(r"%(lanemask_lt)$", o):
            return "((1u<<(emu::C.cur&31))-1)"
        if o in s.regs:
            w, r = s.regs[o], s.reg(o)
            if t in FLOATS:
                return f"bc<{CT[t]}>({r})" if w == W[t] else f"bc<{CT[t]}>(({RT[W[t]]}){r})"
            return f"(({CT[t]}){r})" if t in CT else r
        if re.match(r"0[fF][0-9a-fA-F]{8}$", o):
            return f"bc<float>(0x{o[2:]}u)" if t == "f32" else f"0x{o[2:]}u"
        if re.match(r"0[dD][0-9a-fA-F]{16}$", o):
            return f"bc<double>(0x{o[2:]}ull)" if t == "f64" else f"0x{o[2:]}ull"
        if re.match(r"0x[0-9A-Fa-f]{4}$", o) and t in ("bf16", "f16"):
            return f"bc<{CT[t]}>((uint16_t){o})"
        if re.match(r"-?(0x[0-9a-fA-F]+|\d+)U?$", o):
            return f"(({CT.get(t, 'int64_t')}){o.rstrip('U')}ll)"
        if o in s.shared:
            return f"((uint64_t){s.shared[o]})"
        if o in s.mod.shared:
            return (
                "((uint64_t)emu_dynoff_%s)" % s.name
                if s.mod.shared[o] is None
                else f"((uint64_t){s.mod.shared[o]})"
            )
        if o in s.mod.glob:
            return "((uint64_t)g_%s)" % re.sub(r"\W", "_", o)
        if o in dict(s.local):
            return f"((uint64_t)l_{o})"
        raise Unsupported("operand " + o)

    def asg(s, dst, t, e):
        """Assignment of expression e (of PTX type t) to a register."""
        if dst == "_":
            return f"(void)({e});"
        w = s.width(dst)
        if t == "pred":
            return f"{s.reg(dst)} = {e};"
        if t in FLOATS:
            return f"{s.reg(dst)} = bc<{RT[W[t]]}>(({CT[t]})({e}));"
        return f"{s.reg(dst)} = ({RT[w]})({CT[t]})({e});"

    def addr(s, o):
        """[base + offset] -> (base, offset)."""
        m = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]$", o)
        if not m:
            raise Unsupported("address " + o)
        return m.group(1), int(m.group(2) or 0)

    def F(s, t, e):
        """Expression e rounded to the floating type t."""
        return f"dn<{CT[t]}>({e})"

    def emit(s, pred, op, ops, line):
        """Append the C++ of one instruction, with its predicate."""
        p = op.split(".")
        b, mods, t = p[0], p[1:-1], p[-1]
        c = s._emit(b, mods, t, p, ops, line)
        s.code.append(
            (f"if({'!' if pred[0] == '!' else ''}{s.reg(pred.lstrip('!'))}) {{ {c} }}" if pred else c)
        )

    def _emit(s, b, mods, t, p, ops, line):
        """C++ of one instruction: b opcode, mods modifiers, t type, p = opcode split at dots."""
        V, A = s.val, s.asg
        if b in ("ret", "exit"):
            return "return;"
        if b == "trap":
            return f'emu::fail("trap",{line}); return;'
        if b == "bra":
            return f"goto {re.sub(r'[^A-Za-z0-9_]', '_', ops[0])};"
        if b in ("bar", "barrier") and "sync" in p and "warp" not in p:
            s.sync = True
            return f"emu::syncthreads({line});"
        if b == "bar" and "warp" in p:
            s.sync = True
            return f"emu::warp_wait({V(ops[0], 'u32')},{line});"
        if b in ("membar", "fence", "griddepcontrol", "nanosleep", "prefetch", "prefetchu"):
            return ";"
        if b in ("ld", "ldu"):
            sp = next((x for x in p if x in ("param", "global", "shared", "local", "const")), "generic")
            n = next((int(x[1]) for x in p if x in ("v2", "v4")), 1)
            base, off = s.addr(ops[1])
            dst = split_ops(ops[0][1:-1]) if ops[0][0] == "{" else [ops[0]]
            sz = W[t] // 8
            ut = "u" + str(W[t])
            out = []
            if sp == "param":
                i = [x[0] for x in s.params].index(base)
                return " ".join(
                    A(d, ut, f"*(const {CT[ut]}*)((const char*)P[{i}]+{off + k * sz})")
                    if not t.startswith("s")
                    else A(d, t, f"*(const {CT[t]}*)((const char*)P[{i}]+{off + k * sz})")
                    for k, d in enumerate(dst)
                )
            ad = f"({V(base, 'u64')}+({off}ll))"
            rt = t if t.startswith("s") else ut
            if n > 1:
                out.append(f"ALIGNV({ad},{n * sz},{line});")
            f = {
                "shared": f"LDS<{CT[rt]}>((uint32_t)",
                "local": f"*({CT[rt]}*)(",
                "const": f"*({CT[rt]}*)(",
            }.get(sp, f"LDG<{CT[rt]}>(")
            tmp = [
                f"auto t{k} = {f}{ad}+{k * sz}" + (f",{line})" if sp not in ("local", "const") else ")") + ";"
                for k in range(len(dst))
            ]
            return "{ " + " ".join(out + tmp + [A(d, rt, f"t{k}") for k, d in enumerate(dst)]) + " }"
        if b == "st":
            sp = next((x for x in p if x in ("global", "shared", "local")), "generic")
            n = next((int(x[1]) for x in p if x in ("v2", "v4")), 1)
            base, off = s.addr(ops[0])
            src = split_ops(ops[1][1:-1]) if ops[1][0] == "{" else [ops[1]]
            sz = W[t] // 8
            ut = "u" + str(W[t])
            ad = f"({V(base, 'u64')}+({off}ll))"
            out = [f"ALIGNV({ad},{n * sz},{line});"] if n > 1 else []
            for k, x in enumerate(src):
                v = V(x, t) if re.match(r"0[fFdD]", x) and t[0] == "f" else V(x, ut)
                v = f"bc<{CT[ut]}>({v})" if re.match(r"0[fFdD]", x) and t[0] == "f" else f"({CT[ut]})({v})"
                out.append(
                    {
                        "shared": f"STS<{CT[ut]}>((uint32_t)({ad}+{k * sz}),{v},{line});",
                        "local": f"*({CT[ut]}*)({ad}+{k * sz}) = {v};",
                    }.get(sp, f"STG<{CT[ut]}>({ad}+{k * sz},{v},{line});")
                )
            return " ".join(out)
        if b == "mov":
            if t == "pred":
                return A(
                    ops[0], "pred", {"0": "false", "1": "true", "-1": "true"}.get(ops[1]) or V(ops[1], "pred")
                )
            if ops[0][0] == "{":
                d = split_ops(ops[0][1:-1])
                w = W[t] // len(d)
                return (
                    "{ auto t = "
                    + V(ops[1], "u" + str(W[t]))
                    + "; "
                    + " ".join(A(x, f"u{w}", f"(uint{w}_t)(t >> {k * w})") for k, x in enumerate(d))
                    + " }"
                )
            ut = "u" + str(W[t])
            v = V(ops[1], t) if re.match(r"0[fFdD]", ops[1]) and t[0] == "f" else V(ops[1], ut)
            return A(ops[0], t, v) if re.match(r"0[fFdD]", ops[1]) and t[0] == "f" else A(ops[0], ut, v)
        if b == "cvta":
            if "shared" in p:
                return A(
                    ops[0],
                    "u64",
                    f"{V(ops[1], 'u64')} - (uint64_t)SH"
                    if "to" in p
                    else f"{V(ops[1], 'u64')} + (uint64_t)SH",
                )
            return A(ops[0], "u64", V(ops[1], "u64"))
        if b == "cvt":
            ty = [x for x in p[1:] if x in W]
            d, a = ty[0], ty[1]
            rnd = next((x for x in p if re.match(r"r[nzmp]i?$", x)), None)
            v = V(ops[1], a)
            if d in FLOATS and a in FLOATS:
                e = f"up({v})"
                if rnd in ("rzi", "rni", "rmi", "rpi"):
                    e = {"rzi": "trunc", "rni": "nearbyint", "rmi": "floor", "rpi": "ceil"}[rnd] + f"({e})"
                if "sat" in p:
                    e = f"[](double x){{ return x!=x?0.0:x<0?0.0:x>1?1.0:x; }}({e})"
                return A(ops[0], d, s.F(d, e))
            if d in FLOATS:
                return A(ops[0], d, s.F(d, f"(double){v}") if d != "f32" else f"(float){v}")
            if a in FLOATS:
                return A(
                    ops[0],
                    d,
                    f"f2i<{CT[d]}>("
                    + {"rzi": "trunc", "rni": "nearbyint", "rmi": "floor", "rpi": "ceil"}[rnd]
                    + f"((double)up({v})))",
                )
            return s.asg(ops[0], d, v) if W[d] <= s.width(ops[0]) else A(ops[0], d, v)
        if b == "setp":
            ty = t
            cmpop = p[1]
            a, c = V(ops[1], ty), V(ops[2], ty)
            if ty in FLOATS:
                a, c = f"up({a})", f"up({c})"
                un = cmpop in ("equ", "neu", "ltu", "leu", "gtu", "geu")
                base = cmpop[:2]
                sym = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.get(base)
                if cmpop == "num":
                    e = f"({a}=={a} && {c}=={c})"
                elif cmpop == "nan":
                    e = f"({a}!={a} || {c}!={c})"
                else:
                    e = f"({a}{sym}{c})"
                    nan = f"({a}!={a} || {c}!={c})"
                    e = f"({e} || {nan})" if un else f"({e} && !{nan})"
            else:
                sym = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
                sym |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
                e = f"({a} {sym[cmpop]} {c})"
            bop = next((x for x in mods if x in ("and", "or", "xor")), None)
            if bop:
                e = f"({e} {({'and': '&&', 'or': '||', 'xor': '!='})[bop]} {V(ops[3], 'pred')})"
            d = ops[0].split("|")
            return A(d[0].strip(), "pred", e) + (
                f" {s.reg(d[1].strip())} = !{s.reg(d[0].strip())};" if len(d) > 1 else ""
            )
        if b == "selp":
            return A(ops[0], t, f"{V(ops[3], 'pred')} ? {V(ops[1], t)} : {V(ops[2], t)}")
        if t == "pred" and b in ("and", "or", "xor", "not"):
            if b == "not":
                return A(ops[0], "pred", f"!{V(ops[1], 'pred')}")
            sym = {"and": "&&", "or": "||", "xor": "!="}[b]
            return A(ops[0], "pred", f"({V(ops[1], 'pred')} {sym} {V(ops[2], 'pred')})")
        if b == "shfl":
            s.sync = True
            kind = {"bfly": 0, "down": 1, "up": 2, "idx": 3}[p[2]]
            d = ops[0].split("|")
            return "{ bool ok; auto t = shflx(%d,%s,%s,%s,%s,ok,%d); %s %s }" % (
                kind,
                V(ops[1], "u32"),
                V(ops[2], "u32"),
                V(ops[3], "u32"),
                V(ops[4], "u32"),
                line,
                A(d[0].strip(), "u32", "t"),
                f"{s.reg(d[1].strip())} = ok;" if len(d) > 1 else "",
            )
        if b == "vote":
            s.sync = True
            k = p[2]
            e = f"emu::ballot({V(ops[2], 'u32')},{V(ops[1], 'pred')},{line})"
            return (
                A(ops[0], "u32", e)
                if k == "ballot"
                else A(ops[0], "pred", f"({e} != 0)" if k == "any" else f"({e} == {V(ops[2], 'u32')})")
            )
        if b == "activemask":
            return A(ops[0], "u32", "0xffffffffu")
        if b in ("atom", "red"):
            k = next(
                x for x in p if x in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
            )
            a = ops[1:] if b == "atom" else ops
            base, off = s.addr(a[0])
            sh = "shared" in p
            ad = f"({V(base, 'u64')}+({off}ll))"
            L, S_ = ("LDS", "STS") if sh else ("LDG", "STG")
            cast = "(uint32_t)" if sh else ""
            v = V(a[1], t)
            e = {
                "add": f"o + {v}",
                "min": f"({v} < o ? {v} : o)",
                "max": f"({v} > o ? {v} : o)",
                "and": f"o & {v}",
                "or": f"o | {v}",
                "xor": f"o ^ {v}",
                "exch": v,
                "cas": f"(o == {v} ? {V(a[2], t) if len(a) > 2 else 0} : o)",
            }[k]
            if t in ("f16", "bf16"):
                e = f"dn<{CT[t]}>(up(o)+up({v}))"
            ty, back = CT[t], A(ops[0], t, "o") if b == "atom" else ""
            load, store = (
                f"{ty} o = {L}<{ty}>({cast}{ad},{line});",
                f"{S_}<{ty}>({cast}{ad},({ty})({e}),{line});",
            )
            return "{ " + f"{load} {store} {back}" + " }"
        if t in FLOATS:
            x = [f"up({V(o, t)})" for o in ops[1:]]
            if b in ("add", "sub", "mul", "div"):
                e = f"{x[0]} {dict(add='+', sub='-', mul='*', div='/')[b]} {x[1]}"
                return A(ops[0], t, e if t == "f32" else s.F(t, e))
            if b in ("fma", "mad"):
                r = next((q for q in mods if q in ("rm", "rp", "rz")), None)
                return A(
                    ops[0],
                    t,
                    f"fma_{r}({','.join(x)})"
                    if r in ("rm", "rp")
                    else (f"fmaf({','.join(x)})" if t == "f32" else s.F(t, f"fma({','.join(x)})")),
                )
            if b == "neg":
                return A(ops[0], t, s.F(t, f"-{x[0]}") if t != "f32" else f"-{x[0]}")
            if b == "abs":
                return A(ops[0], t, s.F(t, f"fabs({x[0]})"))
            if b in ("min", "max"):
                return A(ops[0], t, s.F(t, f"f{b}({x[0]},{x[1]})"))
            fn = {
                "sqrt": "sqrt({})",
                "rsqrt": "1.0/sqrt({})",
                "rcp": "1.0/({})",
                "ex2": "exp2f({})" if t == "f32" else "exp2({})",
                "lg2": "log2f({})",
                "sin": "sinf({})",
                "cos": "cosf({})",
                "tanh": "tanhf({})",
            }.get(b)
            if fn:
                return A(ops[0], t, s.F(t, fn.format(x[0])))
            if b == "copysign":
                return A(ops[0], t, f"copysign({x[1]},{x[0]})")
            raise Unsupported(".".join(p))
        if (
            b in ("add", "sub", "and", "or", "xor")
            or (b in ("mul", "mad") and "lo" in mods)
            or b in ("div", "rem", "min", "max")
        ):
            x, y = V(ops[1], t), V(ops[2], t)
            if b in ("mul", "mad"):
                ut = "u" + str(W[t])
                e = f"({V(ops[1], ut)} * {V(ops[2], ut)})" + (f" + {V(ops[3], ut)}" if b == "mad" else "")
                return A(ops[0], t, e)
            if b in ("add", "sub"):
                ut = "u" + str(W[t])
                return A(ops[0], t, f"{V(ops[1], ut)} {'+' if b == 'add' else '-'} {V(ops[2], ut)}")
            if b in ("div", "rem"):
                return A(ops[0], t, f"({y} == 0 ? ({CT[t]})-1 : {x} {'/' if b == 'div' else '%'} {y})")
            if b in ("min", "max"):
                return A(ops[0], t, f"({x} {'<' if b == 'min' else '>'} {y} ? {x} : {y})")
            return A(ops[0], t, f"{x} {({'and': '&', 'or': '|', 'xor': '^'})[b]} {y}")
        if b in ("mul", "mad") and "wide" in mods:
            wt = t[0] + str(2 * W[t])
            return A(
                ops[0],
                wt,
                f"({CT[wt]}){V(ops[1], t)} * ({CT[wt]}){V(ops[2], t)}"
                + (f" + {V(ops[3], wt)}" if b == "mad" else ""),
            )
        if b in ("mul", "mad") and "hi" in mods:
            big = "__int128" if t[0] == "s" else "unsigned __int128"
            return A(
                ops[0],
                t,
                f"(({big}){V(ops[1], t)} * {V(ops[2], t)}) >> {W[t]}"
                + (f" + {V(ops[3], t)}" if b == "mad" else ""),
            )
        if b in ("shl", "shr"):
            n = V(ops[2], "u32")
            x = V(ops[1], t)
            over = f"({x} < 0 ? -1 : 0)" if t[0] == "s" and b == "shr" else "0"
            return A(ops[0], t, f"({n} >= {W[t]} ? {over} : {x} {'<<' if b == 'shl' else '>>'} {n})")
        if b == "neg":
            return A(ops[0], t, f"-{V(ops[1], t)}")
        if b == "not":
            return A(ops[0], t, f"~{V(ops[1], t)}")
        if b == "abs":
            return A(ops[0], t, f"({V(ops[1], t)} < 0 ? -{V(ops[1], t)} : {V(ops[1], t)})")
        if b == "popc":
            return A(ops[0], "u32", f"__builtin_popcountll({V(ops[1], 'u' + str(W[t]))})")
        if b == "clz":
            x = V(ops[1], "u" + str(W[t]))
            return A(ops[0], "u32", f"({x} ? __builtin_clzll((uint64_t){x}) - {64 - W[t]} : {W[t]})")
        if b == "lop3":
            return A(
                ops[0], "u32", f"lop3({V(ops[1], 'u32')},{V(ops[2], 'u32')},{V(ops[3], 'u32')},{ops[4]})"
            )
        if b == "prmt":
            return A(ops[0], "u32", f"prmt({V(ops[1], 'u32')},{V(ops[2], 'u32')},{V(ops[3], 'u32')})")
        if b == "shf":
            hi, lo, n = V(ops[2], "u64"), V(ops[1], "u32"), V(ops[3], "u32")
            n = f"({n}&31)" if "wrap" in p else f"({n}>32?32:{n})"
            return A(
                ops[0],
                "u32",
                f"(uint32_t)(((({hi})<<32)|{lo}) << {n} >> 32)"
                if "l" in p
                else f"(uint32_t)(((({hi})<<32)|{lo}) >> {n})",
            )
        if b == "bfe":
            x, pos, n = V(ops[1], "u" + str(W[t])), V(ops[2], "u32"), V(ops[3], "u32")
            return A(ops[0], t, f"bfe<{CT[t]}>({x},{pos}&255,{n}&255)")
        raise Unsupported(".".join(p))


class Module:
    """Names that all functions of a PTX module see: shared (offset, None = dynamic) and global variables."""

    def __init__(self):
        self.shared, self.glob = {}, {}


LINKAGE = r"(?:\.visible |\.extern |\.weak )*"
SHARED = re.compile(
    LINKAGE + r"\.shared (?:\.attribute\([^)]*\) )?(?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d*)\])?"
)
GLOBAL = re.compile(
    LINKAGE + r"\.(?:global|const) (?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d+)\])?(?: = (.*))?;"
)
PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
LAUNCH = """EMU_API int emu_launch__@NAME@(const emu::Cfg* c, void** p) {
  emu::Cfg d = *c;
  d.shm = emu_dynoff_@NAME@ + c->shm;
  if (c->shm > 227 * 1024) return 2;
  SHN = d.shm;
  static std::vector<char> buf;
  if (buf.size() < d.shm + 16) buf.resize(d.shm + 16);
  SH = (char*)(((uintptr_t)buf.data() + 15) & ~15ull);
  d.shm = 0;
  emu::C.shp = SH;
  emu::C.shn = SHN;
  return emu::run_grid(d, [&] { k_@NAME@(p); }, @DIRECT@);
}
EMU_API int emu_nparams__@NAME@() { return @COUNT@; }
EMU_API void emu_psizes__@NAME@(int* o) { @SIZES@ }"""


def translate(ptx):
    """PTX text -> (C++ source with emu_launch__NAME functions, kernel names)."""
    mod = Module()
    lines = ptx.splitlines()
    out = [PRE]
    fns = []
    i = 0
    soff = 0
    cur = None
    depth = 0

    def decl_shared(l, table):
        """Place a .shared variable."""
        nonlocal soff
        m = SHARED.match(l)
        al, ty, n, cnt = int(m.group(1) or 4), m.group(2), m.group(3), m.group(4)
        if ".extern" in l or cnt == "":
            table[n] = None
            return
        soff = (soff + al - 1) // al * al
        table[n] = soff
        soff += W[ty] // 8 * int(cnt or 1)

    while i < len(lines):
        l = re.sub(r"\s+", " ", re.sub(r"//.*", "", lines[i])).strip()
        i += 1
        if not l:
            continue
        if cur is None:
            if re.match(r"\.(version|target|address_size|file)", l):
                continue
            if re.search(r"\.func\b", l):
                raise Unsupported(".func")
            if re.search(r"\.entry", l):
                hdr = l
                while "{" not in hdr:
                    hdr += " " + re.sub(r"//.*", "", lines[i]).strip()
                    i += 1
                name = re.search(r"\.entry\s+([\w$]+)", hdr).group(1)
                plist = re.search(r"\((.*?)\)", hdr)
                params = []
                for x in split_ops(plist.group(1)) if plist else []:
                    m = PARAM.search(x)
                    params.append((m.group(3), W[m.group(2)] // 8 * int(m.group(4) or 1)))
                cur = Fn(name, params, mod)
                depth = 1
                continue
            if ".shared" in l:
                decl_shared(l, mod.shared)
                continue
            m = GLOBAL.match(l)
            if m:
                ini = m.group(5) or "{0}"
                ini = ini if ini.startswith("{") else "{" + ini + "}"
                mod.glob[m.group(3)] = 1
                ty, name = CT.get(m.group(2), "uint8_t"), re.sub(r"[^A-Za-z0-9_]", "_", m.group(3))
                out.append(f"alignas(16) static {ty} g_{name}[{m.group(4) or 1}] = {ini};")
            continue
        is_label = re.match(r"^[\w$]+:$", l)
        for st in [l] if is_label else re.findall(r"[{}]|[^;{}]*(?:\{[^}]*\}[^;{}]*)*;|[\w$]+:", l):
            st = st.strip().rstrip(";").strip()
            if not st:
                continue
            if st == "{":
                depth += 1
                continue
            if st == "}":
                depth -= 1
                if depth == 0:
                    fns.append(cur)
                    cur = None
                continue
            if st.endswith(":"):
                cur.code.append(re.sub(r"[^A-Za-z0-9_]", "_", st[:-1]) + ":;")
                continue
            m = re.match(r"\.reg\s+\.(\w+)\s+(.*)", st)
            if m:
                for r in split_ops(m.group(2)):
                    q = re.match(r"(%?[\w$]+)<(\d+)>", r)
                    for nm in [f"{q.group(1)}{k}" for k in range(int(q.group(2)))] if q else [r]:
                        cur.regs[nm] = W[m.group(1)]
                continue
            if ".shared" in st and st.startswith("."):
                decl_shared(st, cur.shared)
                continue
            m = re.match(r"\.local (?:\.align (\d+) )?\.(\w+) ([\w$]+)\[(\d+)\]", st)
            if m:
                cur.local.append((m.group(3), int(m.group(4)) * W[m.group(2)] // 8))
                continue
            if st.startswith("."):
                continue
            pred = None
            m = re.match(r"@(!?)(%?\w+)\s+(.*)", st)
            if m:
                pred, st = m.group(1) + m.group(2), m.group(3)
            m = re.match(r"([\w.:]+)\s*(.*)", st)
            op = re.sub(r"\.(L1|L2)::[\w]+", "", m.group(1))
            cur.emit(pred, op, split_ops(m.group(2)), i)
    for f in fns:
        out.append(f"static uint64_t emu_dynoff_{f.name}={(soff + 15) // 16 * 16};")
        out.append(f"static void k_{f.name}(void** P) {{")
        byw = {}
        for r, w in f.regs.items():
            byw.setdefault(w, []).append(f.reg(r) + "=0")
        for w, rs in byw.items():
            out.append(f"  {RT[w]} {', '.join(rs)};")
        for n, sz in f.local:
            out.append(f"  alignas(16) char l_{n}[{sz}]; memset(l_{n},0xFF,{sz});")
        out += ["  " + c for c in f.code] + ["}"]
        sizes = " ".join(f"o[{k}]={size};" for k, (_, size) in enumerate(f.params))
        text = LAUNCH.replace("@NAME@", f.name).replace("@DIRECT@", "false" if f.sync else "true")
        out.append(text.replace("@COUNT@", str(len(f.params))).replace("@SIZES@", sizes))
    return "\n".join(out) + "\n", [f.name for f in fns]
