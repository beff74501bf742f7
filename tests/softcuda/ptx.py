"""Translate the PTX that NVRTC emits into C++ for the fiber engine of emulator/cudaemu.h.

Every load and store goes through a function of emulator/ptx_prelude.h that checks its bounds and
its alignment, and in shared memory that no other warp used the same byte since the last barrier:
a memory checker, on what the real compiler made of the kernel. Words are those of the PTX ISA.

What is not known raises Unsupported, never a guess: calls of .func, mma, ldmatrix, cp.async, TMA,
textures, packed halves, roundings other than those of IEEE's default, named barriers.
"""

import re
from typing import Any, NamedTuple


class Unsupported(Exception):  # noqa: N818 - it says what is so, and is no error of the kernel's
    """PTX that this translator does not know."""


# ---- types --------------------------------------------------------------------------------------

FLOATS = ("f16", "bf16", "f32", "f64")
BITS = {f"{kind}{n}": n for n in (8, 16, 32, 64) for kind in "bus"}
BITS |= {"pred": 1, "f16": 16, "bf16": 16, "f32": 32, "f16x2": 32, "bf16x2": 32, "f64": 64}
C_TYPE = {f"{kind}{n}": f"uint{n}_t" for n in (8, 16, 32, 64) for kind in "bu"}
C_TYPE |= {f"s{n}": f"int{n}_t" for n in (8, 16, 32, 64)}
C_TYPE |= {"f32": "float", "f64": "double", "f16": "_h", "bf16": "_bf"}
REGISTER = {1: "bool", 8: "uint8_t", 16: "uint16_t", 32: "uint32_t", 64: "uint64_t"}
SPECIAL = {"tid": "threadIdx", "ntid": "blockDim", "ctaid": "blockIdx", "nctaid": "gridDim"}
LANE = "(emu::C.cur & 31)"
LANE_VALUES = {
    "%laneid": f"(uint32_t){LANE}",
    "%warpid": "(uint32_t)(emu::C.cur >> 5)",
    "%lanemask_eq": f"(1u << {LANE})",
    "%lanemask_lt": f"((1u << {LANE}) - 1)",
    "%lanemask_le": f"((2u << {LANE}) - 1)",
    "%lanemask_gt": f"~((2u << {LANE}) - 1)",
    "%lanemask_ge": f"~((1u << {LANE}) - 1)",
}


def unsigned(kind):
    """The unsigned type of as many bits."""
    return f"u{BITS[kind]}"


def identifier(name):
    """A PTX name as a C++ name."""
    return re.sub(r"\W", "_", name)


def split(text):
    """Operands: split at the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def matched(pattern, text):
    """The match of a pattern at the start of a text that must have one."""
    if (match := re.match(pattern, text)) is None:
        raise Unsupported(text)
    return match


def members(operand):
    """The operands of a vector in braces, or the one that it is."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]


class Instruction(NamedTuple):
    """One instruction, without its predicate: parts are the opcode split at its dots."""

    parts: list[str]
    operands: list[str]
    line: int  # in the PTX, for messages

    @property
    def kind(self):
        """Its (last) type."""
        return self.parts[-1]

    def has(self, *words):
        """Whether one of these is among its modifiers."""
        return any(word in self.parts for word in words)

    def one_of(self, *words):
        """Which of these is among its modifiers, or None."""
        return next((word for word in words if word in self.parts), None)


class Kernel:
    """An .entry: its registers and memory, and the C++ of its instructions so far."""

    def __init__(self, name, parameters, module):
        self.name, self.parameters, self.module = name, parameters, module  # [(name, bytes)]
        self.registers, self.shared, self.local, self.lines = {}, {}, {}, []
        self.waits = False  # for other threads: if not, it needs no fibers

    def register(self, name):
        """The C++ variable of a register."""
        if name not in self.registers:
            raise Unsupported(f"register {name}")
        return "R_" + identifier(name)

    # ---- operands -------------------------------------------------------------------------------

    def value(self, operand, kind):
        """An operand, as a C++ expression of that type."""
        if kind == "pred":
            negated = operand.startswith("!")
            return "!" * negated + self.register(operand[negated:])
        if operand.startswith("{"):
            return self.packed(operand, kind)
        if operand in self.registers:
            return self.register_value(operand, kind)
        if re.match(r"%n?(tid|ctaid)\.[xyz]$", operand):
            name, axis = operand[1:].split(".")
            return f"{SPECIAL[name]}.{axis}"
        if operand in LANE_VALUES:
            return LANE_VALUES[operand]
        if re.match(r"-?\d|0[fFdD]", operand):
            return constant(operand, kind)
        return self.address_of(operand)

    def packed(self, operand, kind):
        """Several registers as one number, the first in the lowest bits."""
        parts = members(operand)
        bits = BITS[kind] // len(parts)
        shifted = (
            f"((uint{BITS[kind]}_t)(uint{bits}_t)({self.value(part, f'u{bits}')}) << {i * bits})"
            for i, part in enumerate(parts)
        )
        return f"({' | '.join(shifted)})"

    def register_value(self, operand, kind):
        """A register's bits as a number of that type."""
        bits, name = self.registers[operand], self.register(operand)
        if kind in FLOATS:
            narrowed = name if bits == BITS[kind] else f"({REGISTER[BITS[kind]]}){name}"
            return f"bc<{C_TYPE[kind]}>({narrowed})"
        return f"(({C_TYPE[kind]}){name})" if kind in C_TYPE else name

    def address_of(self, name):
        """The address of a variable; in shared memory, its offset."""
        if name in self.local:
            return f"((uint64_t)l_{identifier(name)})"
        for shared in (self.shared, self.module.shared):
            if name in shared:
                offset = f"emu_dynoff_{self.name}" if shared[name] is None else shared[name]
                return f"((uint64_t){offset})"
        if name in self.module.globals:
            return f"((uint64_t)g_{identifier(name)})"
        raise Unsupported(f"operand {name}")

    def place(self, operand):
        """[base + offset] as a C++ expression."""
        match = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]$", operand)
        if not match:
            raise Unsupported(f"address {operand}")
        return f"({self.value(match[1], 'u64')} + ({match[2] or 0}ll))"

    def assign(self, target, kind, expression):
        """Put an expression of that type into a register."""
        if target == "_":
            return f"(void)({expression});"
        name = self.register(target)
        if kind == "pred":
            return f"{name} = {expression};"
        if kind in FLOATS:
            return f"{name} = bc<{REGISTER[BITS[kind]]}>(({C_TYPE[kind]})({expression}));"
        return f"{name} = ({REGISTER[self.registers[target]]})({C_TYPE[kind]})({expression});"

    # ---- instructions ---------------------------------------------------------------------------

    def add(self, predicate, instruction):
        """Append an instruction, done only if the predicate is true."""
        emit = EMITTERS.get(instruction.parts[0])
        if emit is None:
            raise Unsupported(".".join(instruction.parts))
        try:
            text = emit(self, instruction)
        except (KeyError, IndexError, TypeError, ValueError):  # a modifier or form not foreseen
            raise Unsupported(".".join(instruction.parts)) from None
        condition = f"if ({self.value(predicate, 'pred')}) " if predicate else ""
        self.lines.append(f"{condition}{{ {text} }}" if predicate else text)


def constant(text, kind):
    """A number, written as PTX writes it."""
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        return f"bc<float>(0x{text[2:]}u)" if kind == "f32" else f"0x{text[2:]}u"
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        return f"bc<double>(0x{text[2:]}ull)" if kind == "f64" else f"0x{text[2:]}ull"
    if kind in ("f16", "bf16"):
        return f"bc<{C_TYPE[kind]}>((uint16_t){text})"
    if re.match(r"-?(0x[0-9a-fA-F]+|\d+)U?$", text):
        return f"(({C_TYPE[kind]}){text.rstrip('U')}ll)"
    raise Unsupported(f"constant {text}")


# ---- emitters: opcode -> C++ --------------------------------------------------------------------

EMITTERS: dict[str, Any] = {}


def emits(*opcodes):
    """Register what makes C++ of these opcodes: a function of the kernel and the instruction."""

    def register(emit):
        EMITTERS.update(dict.fromkeys(opcodes, emit))
        return emit

    return register


def unknown(instruction):
    """Refuse one form of an opcode that is known in others."""
    return Unsupported(".".join(instruction.parts))


@emits("ret", "exit")
def leave(kernel, i):
    return "return;"


@emits("trap")
def trap(kernel, i):
    return f'emu::fail("trap", {i.line}); return;'


@emits("bra")
def branch(kernel, i):
    return f"goto {identifier(i.operands[0])};"


@emits("membar", "fence", "griddepcontrol", "nanosleep", "prefetch", "prefetchu")
def nothing(kernel, i):
    """Memory is one and in order here, and nothing is to be waited for."""
    return ";"


@emits("bar", "barrier")
def barrier(kernel, i):
    kernel.waits = True
    if i.has("warp"):
        return f"emu::warp_wait({kernel.value(i.operands[0], 'u32')}, {i.line});"
    if not i.has("sync") or i.operands != ["0"]:
        raise unknown(i)
    return f"emu::syncthreads({i.line});"


# ---- memory


SPACES = ("param", "global", "shared", "local", "const")


@emits("ld", "ldu")
def load(kernel, i):
    space = i.one_of(*SPACES)
    kind = i.kind if i.kind[0] == "s" else unsigned(i.kind)
    targets, size = members(i.operands[0]), BITS[kind] // 8
    if space == "param":
        return load_parameter(kernel, i, targets, kind)
    at = kernel.place(i.operands[1])
    checks = [f"ALIGNV({at}, {len(targets) * size}, {i.line});"] if len(targets) > 1 else []
    reads = (
        f"auto t{n} = {access('LD', space)}<{C_TYPE[kind]}>({at} + {n * size}, {i.line});"
        for n in range(len(targets))
    )
    # All are read before any is written: the address may be in one of the targets.
    writes = (kernel.assign(target, kind, f"t{n}") for n, target in enumerate(targets))
    return f"{{ {' '.join([*checks, *reads, *writes])} }}"


def load_parameter(kernel, i, targets, kind):
    """Parameters lie where the launch put them: P[number of the parameter]."""
    base, offset = matched(r"\[([\w$]+)(?:\+(\d+))?\]$", i.operands[1]).groups()
    number = [name for name, _ in kernel.parameters].index(base)
    start, size = int(offset or 0), BITS[kind] // 8
    return " ".join(
        kernel.assign(
            target, kind, f"*(const {C_TYPE[kind]}*)((const char*)P[{number}] + {start + n * size})"
        )
        for n, target in enumerate(targets)
    )


def access(verb, space):
    """The checking function of a memory space: load LD or store ST."""
    return verb + {"global": "G", "shared": "S", "local": "L", "const": "L", None: "X"}[space]


@emits("st")
def store(kernel, i):
    space, kind = i.one_of(*SPACES), unsigned(i.kind)
    at, sources, size = kernel.place(i.operands[0]), members(i.operands[1]), BITS[kind] // 8
    checks = [f"ALIGNV({at}, {len(sources) * size}, {i.line});"] if len(sources) > 1 else []
    writes = (
        f"{access('ST', space)}<{C_TYPE[kind]}>"
        f"({at} + {n * size}, ({C_TYPE[kind]})({kernel.value(source, kind)}), {i.line});"
        for n, source in enumerate(sources)
    )
    return " ".join([*checks, *writes])


ATOMICS = {
    "add": "o + {0}",
    "min": "({0} < o ? {0} : o)",
    "max": "({0} > o ? {0} : o)",
    "and": "o & {0}",
    "or": "o | {0}",
    "xor": "o ^ {0}",
    "exch": "{0}",
    "cas": "(o == {0} ? {1} : o)",
}


@emits("atom", "red")
def atomic(kernel, i):
    """A load and a store: no other fiber runs between them."""
    arguments = i.operands[1:] if i.parts[0] == "atom" else i.operands
    at, values = kernel.place(arguments[0]), [kernel.value(v, i.kind) for v in arguments[1:]]
    new, kind = ATOMICS[i.one_of(*ATOMICS)].format(*values), C_TYPE[i.kind]
    if i.kind in ("f16", "bf16"):
        new = f"dn<{kind}>(up(o) + up({values[0]}))"
    space = {"shared": "A", "global": "G", None: "X"}[i.one_of("shared", "global")]
    read = f"{kind} o = LD{space}<{kind}>({at}, {i.line});"
    write = f"ST{space}<{kind}>({at}, ({kind})({new}), {i.line});"
    back = kernel.assign(i.operands[0], i.kind, "o") if i.parts[0] == "atom" else ""
    return f"{{ {read} {write} {back} }}"


# ---- moves and conversions


@emits("mov")
def move(kernel, i):
    target, source = i.operands
    if i.kind == "pred":
        known = {"0": "false", "1": "true", "-1": "true"}
        return kernel.assign(target, "pred", known.get(source) or kernel.value(source, "pred"))
    kind = unsigned(i.kind)
    if target.startswith("{"):
        return unpack(kernel, members(target), kernel.value(source, kind), BITS[kind])
    return kernel.assign(target, kind, kernel.value(source, kind))


def unpack(kernel, targets, value, bits):
    """The parts of a number in several registers, the lowest in the first."""
    each = bits // len(targets)
    parts = (
        kernel.assign(target, f"u{each}", f"(uint{each}_t)(t >> {n * each})")
        for n, target in enumerate(targets)
    )
    return f"{{ auto t = {value}; {' '.join(parts)} }}"


@emits("cvta")
def convert_address(kernel, i):
    """Shared memory alone has addresses of its own."""
    value = kernel.value(i.operands[1], "u64")
    if i.has("shared"):
        value += " - (uint64_t)SH" if i.has("to") else " + (uint64_t)SH"
    return kernel.assign(i.operands[0], "u64", value)


TO_INTEGRAL = {"rzi": "trunc", "rni": "nearbyint", "rmi": "floor", "rpi": "ceil"}


@emits("cvt")
def convert(kernel, i):
    to, source = [part for part in i.parts[1:] if part in BITS]
    if i.has("rz", "rm", "rp") or (i.has("sat") and to not in FLOATS):
        raise unknown(i)
    if to in ("f16x2", "bf16x2"):
        high, low = (rounded(to[:-2], kernel.value(o, source)) for o in i.operands[1:])
        return kernel.assign(i.operands[0], "u32", f"((uint32_t){high}.b << 16) | {low}.b")
    value, integral = kernel.value(i.operands[1], source), i.one_of(*TO_INTEGRAL)
    if source in FLOATS:
        value = f"up({value})"
    if integral:
        value = f"{TO_INTEGRAL[integral]}({value})"
    if to in FLOATS:
        value = saturated(i, value)
        exact = to == "f32" and source not in FLOATS  # int64 -> double -> float rounds twice
        return kernel.assign(i.operands[0], to, f"(float){value}" if exact else rounded(to, value))
    if source in FLOATS:
        value = f"f2i<{C_TYPE[to]}>((double){value})"
    return kernel.assign(i.operands[0], to, value)


def rounded(kind, value):
    """A C++ expression, rounded to a floating type."""
    return f"dn<{C_TYPE[kind]}>({value})"


def saturated(i, value):
    """The value clamped to [0, 1], where .sat asks for it."""
    return f"saturate({value})" if i.has("sat") else value


# ---- comparisons and predicates


COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
LOGIC = {"and": "&&", "or": "||", "xor": "!="}


@emits("setp")
def compare(kernel, i):
    a, b = (kernel.value(operand, i.kind) for operand in i.operands[1:3])
    relation = i.parts[1]
    if i.kind in FLOATS:
        truth = compare_floats(relation, f"up({a})", f"up({b})")
    else:
        truth = f"({a} {COMPARE[relation]} {b})"
    if logic := i.one_of(*LOGIC):
        truth = f"({truth} {LOGIC[logic]} {kernel.value(i.operands[3], 'pred')})"
    first, *second = i.operands[0].split("|")
    text = kernel.assign(first.strip(), "pred", truth)
    if second:
        text += kernel.assign(second[0].strip(), "pred", "!" + kernel.register(first.strip()))
    return text


def compare_floats(relation, a, b):
    """Ordered relations are false for NaN, unordered ones (with a u) are true."""
    unordered = f"({a} != {a} || {b} != {b})"
    if relation in ("num", "nan"):
        return unordered if relation == "nan" else f"!{unordered}"
    truth = f"({a} {COMPARE[relation[:2]]} {b})"
    return f"({truth} || {unordered})" if len(relation) == 3 else f"({truth} && !{unordered})"


@emits("selp")
def select(kernel, i):
    yes, no = (kernel.value(operand, i.kind) for operand in i.operands[1:3])
    return kernel.assign(
        i.operands[0], i.kind, f"{kernel.value(i.operands[3], 'pred')} ? {yes} : {no}"
    )


# ---- other lanes


SHUFFLES = {"bfly": 0, "down": 1, "up": 2, "idx": 3}


@emits("shfl")
def shuffle(kernel, i):
    kernel.waits = True
    target, *inside = i.operands[0].split("|")
    arguments = ", ".join(kernel.value(operand, "u32") for operand in i.operands[1:])
    call = f"shflx({SHUFFLES[i.one_of(*SHUFFLES)]}, {arguments}, ok, {i.line})"
    text = f"bool ok; auto t = {call}; {kernel.assign(target.strip(), 'u32', 't')}"
    if inside:
        text += kernel.assign(inside[0].strip(), "pred", "ok")
    return f"{{ {text} }}"


@emits("vote")
def vote(kernel, i):
    kernel.waits = True
    mask, mode = kernel.value(i.operands[2], "u32"), i.one_of("ballot", "any", "all")
    ballot = f"emu::ballot({mask}, {kernel.value(i.operands[1], 'pred')}, {i.line})"
    if mode == "ballot":
        return kernel.assign(i.operands[0], "u32", ballot)
    return kernel.assign(
        i.operands[0], "pred", ballot + {"any": " != 0", "all": f" == {mask}"}[mode]
    )


@emits("activemask")
def active_mask(kernel, i):
    return kernel.assign(i.operands[0], "u32", "active_mask()")


# ---- arithmetic of both kinds


def of_kind(floating=None, integer=None):
    """An emitter that goes by the type. Packed halves are of neither kind."""

    def emit(kernel, i):
        if i.kind in FLOATS and floating:
            return floating(kernel, i)
        if i.kind in C_TYPE and i.kind not in FLOATS and integer:
            return integer(kernel, i)
        raise unknown(i)

    return emit


def float_operands(kernel, i):
    """The inputs, widened to float or double."""
    if i.has("rz", "rm", "rp") and i.parts[0] != "fma":
        raise unknown(i)
    return [f"up({kernel.value(operand, i.kind)})" for operand in i.operands[1:]]


def assign_float(kernel, i, value):
    """The result, saturated if asked for and rounded to the instruction's type."""
    return kernel.assign(i.operands[0], i.kind, rounded(i.kind, saturated(i, value)))


def float_binary(kernel, i):
    a, b = float_operands(kernel, i)
    sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[i.parts[0]]
    return assign_float(kernel, i, f"{a} {sign} {b}")


def float_extreme(kernel, i):
    a, b = float_operands(kernel, i)
    value = f"f{i.parts[0]}({a}, {b})"
    if i.has("NaN"):  # without it, a NaN gives way to a number
        value = f"({a} != {a} ? {a} : {b} != {b} ? {b} : {value})"
    return assign_float(kernel, i, value)


def float_unary(kernel, i):
    (a,) = float_operands(kernel, i)
    return assign_float(kernel, i, FLOAT_UNARY[i.parts[0]].format(a))


# The approximations of the hardware are not known to the last bit: these are the host's functions.
FLOAT_UNARY = {
    "neg": "-{}",
    "abs": "fabs({})",
    "sqrt": "std::sqrt({})",
    "rsqrt": "1 / std::sqrt({})",
    "rcp": "1 / {}",
    "ex2": "std::exp2({})",
    "lg2": "std::log2({})",
    "sin": "std::sin({})",
    "cos": "std::cos({})",
    "tanh": "std::tanh({})",
}


def copy_sign(kernel, i):
    sign, magnitude = float_operands(kernel, i)
    return assign_float(kernel, i, f"copysign({magnitude}, {sign})")


def fused(kernel, i):
    a, b, c = float_operands(kernel, i)
    if direction := i.one_of("rm", "rp"):
        return kernel.assign(i.operands[0], i.kind, f"fma_{direction}({a}, {b}, {c})")
    if i.has("rz", "relu"):
        raise unknown(i)
    return assign_float(kernel, i, f"std::fma({a}, {b}, {c})")


def integer_operands(kernel, i, kind=None):
    """The inputs, as numbers of the instruction's type or of another."""
    if i.has("cc", "sat"):
        raise unknown(i)
    return [kernel.value(operand, kind or i.kind) for operand in i.operands[1:]]


def integer_binary(kernel, i):
    """Unsigned, since C++ leaves the overflow of signed numbers undefined."""
    a, b = integer_operands(kernel, i, unsigned(i.kind))
    sign = {"add": "+", "sub": "-"}[i.parts[0]]
    return kernel.assign(i.operands[0], i.kind, f"{a} {sign} {b}")


def integer_product(kernel, i):
    """mul and mad: .lo the lower half of the product, .hi the upper, .wide all of it."""
    bits, kind = BITS[i.kind], i.kind
    if i.has("wide"):
        kind = wide = f"{i.kind[0]}{2 * bits}"
        a, b = (f"({C_TYPE[wide]}){value}" for value in integer_operands(kernel, i)[:2])
        product = f"{a} * {b}"
    elif i.has("hi"):
        a, b = integer_operands(kernel, i)[:2]
        big = "__int128" if i.kind[0] == "s" else "unsigned __int128"
        product = f"(({big}){a} * {b}) >> {bits}"
    else:
        a, b = integer_operands(kernel, i, unsigned(i.kind))[:2]
        product = f"(uint64_t){a} * {b}"
    if i.parts[0] == "mad":
        product = f"({product}) + {kernel.value(i.operands[3], kind)}"
    return kernel.assign(i.operands[0], kind, product)


def integer_quotient(kernel, i):
    a, b = integer_operands(kernel, i)
    function = {"div": "quotient", "rem": "remainder"}[i.parts[0]]
    return kernel.assign(i.operands[0], i.kind, f"{function}_of<{C_TYPE[i.kind]}>({a}, {b})")


def integer_extreme(kernel, i):
    a, b = integer_operands(kernel, i)
    return kernel.assign(
        i.operands[0], i.kind, f"{a} {'<' if i.parts[0] == 'min' else '>'} {b} ? {a} : {b}"
    )


def integer_unary(kernel, i):
    (a,) = integer_operands(kernel, i)
    value = f"-{a}" if i.parts[0] == "neg" else f"{a} < 0 ? -{a} : {a}"
    return kernel.assign(i.operands[0], i.kind, value)


EMITTERS |= dict.fromkeys(("add", "sub"), of_kind(float_binary, integer_binary))
EMITTERS |= {"mul": of_kind(float_binary, integer_product)}
EMITTERS |= {"mad": of_kind(fused, integer_product), "fma": of_kind(fused)}
EMITTERS |= {"div": of_kind(float_binary, integer_quotient), "rem": of_kind(None, integer_quotient)}
EMITTERS |= dict.fromkeys(("min", "max"), of_kind(float_extreme, integer_extreme))
EMITTERS |= dict.fromkeys(FLOAT_UNARY, of_kind(float_unary))
EMITTERS |= dict.fromkeys(("neg", "abs"), of_kind(float_unary, integer_unary))
EMITTERS |= {"copysign": of_kind(copy_sign)}


# ---- bits


@emits("and", "or", "xor", "not")
def bitwise(kernel, i):
    values = [kernel.value(operand, i.kind) for operand in i.operands[1:]]
    if i.parts[0] == "not":
        return kernel.assign(
            i.operands[0], i.kind, f"{'!' if i.kind == 'pred' else '~'}{values[0]}"
        )
    sign = (
        LOGIC[i.parts[0]] if i.kind == "pred" else {"and": "&", "or": "|", "xor": "^"}[i.parts[0]]
    )
    return kernel.assign(i.operands[0], i.kind, f"{values[0]} {sign} {values[1]}")


@emits("shl", "shr")
def shift(kernel, i):
    """By as many bits as there are or more: nothing is left but the sign."""
    value, count = kernel.value(i.operands[1], i.kind), kernel.value(i.operands[2], "u32")
    rest = f"({value} < 0 ? -1 : 0)" if i.kind[0] == "s" and i.parts[0] == "shr" else "0"
    sign = "<<" if i.parts[0] == "shl" else ">>"
    return kernel.assign(
        i.operands[0], i.kind, f"{count} >= {BITS[i.kind]} ? {rest} : {value} {sign} {count}"
    )


@emits("shf")
def funnel_shift(kernel, i):
    low, high = kernel.value(i.operands[1], "u32"), kernel.value(i.operands[2], "u64")
    count = kernel.value(i.operands[3], "u32")
    count = f"({count} & 31)" if i.has("wrap") else f"({count} > 32 ? 32 : {count})"
    both = f"((({high}) << 32) | {low})"
    value = f"({both} << {count}) >> 32" if i.has("l") else f"{both} >> {count}"
    return kernel.assign(i.operands[0], "u32", f"(uint32_t)({value})")


@emits("popc", "clz")
def count_bits(kernel, i):
    value = kernel.value(i.operands[1], unsigned(i.kind))
    if i.parts[0] == "popc":
        return kernel.assign(i.operands[0], "u32", f"__builtin_popcountll({value})")
    zeros = f"{value} ? __builtin_clzll((uint64_t){value}) - {64 - BITS[i.kind]} : {BITS[i.kind]}"
    return kernel.assign(i.operands[0], "u32", zeros)


@emits("lop3", "prmt", "dp4a")
def of_three(kernel, i):
    if i.parts[0] == "prmt" and len(i.parts) > 2:
        raise unknown(i)
    kinds = (i.parts[1], i.parts[2], "u32") if i.parts[0] == "dp4a" else ("u32",) * 3
    values = [kernel.value(o, kind) for o, kind in zip(i.operands[1:], kinds, strict=False)]
    values += i.operands[4:]  # the truth table of lop3
    return kernel.assign(i.operands[0], "u32", f"{i.parts[0]}({', '.join(values)})")


@emits("bfe")
def extract_bits(kernel, i):
    value = kernel.value(i.operands[1], unsigned(i.kind))
    start, count = (kernel.value(operand, "u32") for operand in i.operands[2:])
    return kernel.assign(
        i.operands[0], i.kind, f"bfe<{C_TYPE[i.kind]}>({value}, {start} & 255, {count} & 255)"
    )


@emits("bfi")
def insert_bits(kernel, i):
    kind = unsigned(i.kind)
    bits, into = (kernel.value(operand, kind) for operand in i.operands[1:3])
    start, count = (kernel.value(operand, "u32") for operand in i.operands[3:])
    call = f"bfi<{C_TYPE[kind]}>({bits}, {into}, {start} & 255, {count} & 255)"
    return kernel.assign(i.operands[0], kind, call)


# ---- a whole module -----------------------------------------------------------------------------

LINKAGE = r"(?:\.visible |\.extern |\.weak )*"
SHARED = re.compile(
    LINKAGE
    + r"\.shared (?:\.attribute\([^)]*\) )?(?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d*)\])?"
)
GLOBAL = re.compile(
    LINKAGE + r"\.(?:global|const) (?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d+)\])?(?: = (.*))?;"
)
LOCAL = re.compile(r"\.local (?:\.align (\d+) )?\.(\w+) ([\w$]+)\[(\d+)\]")
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
STATEMENT = re.compile(r"[{}]|[^;{}]*(?:\{[^}]*\}[^;{}]*)*;|[\w$]+:")


class Module:
    """A PTX file in the course of its translation."""

    def __init__(self):
        self.shared, self.globals = {}, {}  # name -> offset, None if dynamic;  name -> C++
        self.shared_bytes = 0
        self.kernels: list[Kernel] = []
        self.kernel: Any = None  # the one that is being read
        self.depth = 0

    def read(self, text):
        """Take in all lines."""
        header = ""
        for number, raw in enumerate(text.splitlines(), 1):
            line = re.sub(r"\s+", " ", re.sub(r"//.*", "", raw)).strip()
            if header or ".entry" in line:
                header += " " + line
                if "{" in line:
                    self.begin(header)
                    header = ""
            elif line and self.kernel is None:
                self.declare(line)
            elif line:
                self.read_statements(line, number)

    def begin(self, header):
        """Start a kernel."""
        name = matched(r".*?\.entry ([\w$]+)", header)[1]
        listed = re.search(r"\((.*?)\)", header)
        matches = [matched(PARAMETER, each) for each in split(listed[1] if listed else "")]
        sizes = [(m[3], BITS[m[2]] // 8 * int(m[4] or 1)) for m in matches]
        self.kernel, self.depth = Kernel(name, sizes, self), 1

    def declare(self, line):
        """A line outside of kernels: a variable, or nothing of interest."""
        if re.search(r"\.func\b", line):
            raise Unsupported(".func")
        if ".shared" in line:
            self.declare_shared(line, self.shared)
        elif match := GLOBAL.match(line):
            _, kind, name, count, values = match.groups()
            values = values if (values or "{0}").startswith("{") else f"{{{values}}}"
            self.globals[name] = (
                f"EMU_GLOBAL {C_TYPE[kind]} g_{identifier(name)}[{count or 1}] = {values or '{0}'};"
            )

    def declare_shared(self, line, table):
        """Give a variable its place in shared memory; the dynamic ones begin after all others."""
        align, kind, name, count = matched(SHARED, line).groups()
        if ".extern" in line or count == "":
            table[name] = None
            return
        align = int(align or 4)
        table[name] = (self.shared_bytes + align - 1) // align * align
        self.shared_bytes = table[name] + BITS[kind] // 8 * int(count or 1)

    def read_statements(self, line, number):
        """The statements of one line within a kernel."""
        label = re.match(r"[\w$]+:$", line)
        for statement in [line] if label else STATEMENT.findall(line):
            text = statement.strip().rstrip(";").strip()
            if text in ("{", "}"):
                self.depth += 1 if text == "{" else -1
                if self.depth == 0:
                    self.kernels.append(self.kernel)
                    self.kernel = None
            elif text.endswith(":"):
                self.kernel.lines.append(f"{identifier(text[:-1])}:;")
            elif text.startswith("."):
                self.declare_inside(text)
            elif text:
                self.read_instruction(text, number)

    def declare_inside(self, text):
        """Registers, shared and local variables; other directives mean nothing here."""
        if match := re.match(r"\.reg \.(\w+) (.*)", text):
            for each in split(match[2]):
                many = re.match(r"(%?[\w$]+)<(\d+)>", each)
                names = [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [each]
                self.kernel.registers |= dict.fromkeys(names, BITS[match[1]])
        elif ".shared" in text:
            self.declare_shared(text, self.kernel.shared)
        elif match := LOCAL.match(text):
            self.kernel.local[match[3]] = int(match[4]) * BITS[match[2]] // 8

    def read_instruction(self, text, number):
        """`@predicate opcode operands`."""
        predicate, rest = matched(r"(?:@(!?%?\w+) )?(.*)", text).groups()
        opcode, operands = matched(r"([\w.:]+) ?(.*)", rest).groups()
        parts = re.sub(r"\.L[12]::\w+", "", opcode).split(".")  # cache hints
        self.kernel.add(predicate, Instruction(parts, split(operands), number))


BODY = """static uint64_t emu_dynoff_@NAME@ = @DYNAMIC@;
static void k_@NAME@(void** P) {
@BODY@
}
EMU_API int emu_launch__@NAME@(const emu::Cfg* c, void** p) {
  return launch_translated(*c, emu_dynoff_@NAME@, [&] { k_@NAME@(p); }, @DIRECT@);
}
EMU_API int emu_nparams__@NAME@() { return @COUNT@; }
EMU_API void emu_psizes__@NAME@(int* o) { @SIZES@ }
"""


def translate(ptx):
    """PTX text as (C++ source to be put after ptx_prelude.h, names of its kernels)."""
    module = Module()
    module.read(ptx)
    kernels = [definition(kernel, module.shared_bytes) for kernel in module.kernels]
    text = "\n".join([*module.globals.values(), *kernels])
    return text, [kernel.name for kernel in module.kernels]


def definition(kernel, shared_bytes):
    """The C++ functions of one kernel."""
    lines = [
        f"  {REGISTER[bits]} {kernel.register(name)} = 0;"
        for name, bits in kernel.registers.items()
    ]
    for name, size in kernel.local.items():
        variable = f"l_{identifier(name)}"
        lines.append(f"  alignas(16) char {variable}[{size}]; memset({variable}, 0xFF, {size});")
    lines += [f"  {line}" for line in kernel.lines]
    parameters = enumerate(kernel.parameters)
    words = {
        "NAME": kernel.name,
        "DYNAMIC": str((shared_bytes + 15) // 16 * 16),
        "BODY": "\n".join(lines),
        "DIRECT": "false" if kernel.waits else "true",
        "COUNT": str(len(kernel.parameters)),
        "SIZES": " ".join(f"o[{n}] = {size};" for n, (_, size) in parameters),
    }
    return re.sub(r"@([A-Z]+)@", lambda match: words[match[1]], BODY)
