"""The pickle inside a PyTorch checkpoint, run by an interpreter that can build tensors only.

A pickle is a program, and Python's own unpickler may import and call whatever it names. This one
knows the few instructions that a table of tensors is made of; there is none that calls anything.
Of the names that PyTorch writes, three are acted upon here, storages are records of what was
asked for, and all others are refused. pickletools decodes the instructions, and runs none.

Why not pickle.Unpickler with find_class: a memo index makes it allocate up to 64 GB, and a tuple
nested deep enough, used as a key, overflows the C stack.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama3np.errors import CheckpointError

MAX_BYTES = 1 << 22  # a model of 126 layers has 0.15 MB of pickle
MAX_STEPS = 400_000  # and 60,000 instructions

_STORAGE = re.compile(r"torch\.(storage\.)?(\w*Storage)")
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"


@dataclass(frozen=True)
class Global:
    """A name that the pickle asks for."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of numbers in a file of its own in the archive."""

    kind: str  # "BFloat16Storage": the type of its numbers
    key: str  # the file's name
    size: int  # how many numbers


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, counted in numbers, not bytes. Nothing of it is checked here."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(Exception):
    """Something that no table of tensors needs."""


def load(data: bytes, source: str) -> Any:
    """Run a pickle; return what it makes, of dict, list, tuple, text, numbers and Tensor.

    Raises CheckpointError, naming `source`, for a pickle that is damaged, that is too long for a
    checkpoint, or that asks for anything but tensors.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{source}: expected at most {MAX_BYTES} bytes, found {len(data)}")
    machine = _Machine()
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step == MAX_STEPS:
                raise _RefusedError(f"more than {MAX_STEPS} instructions")
            if opcode.name not in _INSTRUCTIONS:
                raise _RefusedError(f"the instruction {opcode.name}")
            _INSTRUCTIONS[opcode.name](machine, argument)
        return machine.stack.pop()
    except _RefusedError as refused:
        raise CheckpointError(
            f"{source}: refused: expected tensors only, found {refused}"
        ) from None
    except Exception as error:  # whatever damaged bytes lead to: an empty stack, an absent memo
        raise CheckpointError(f"{source}: damaged ({type(error).__name__})") from None


class _Machine:
    """A stack, the places marked on it, and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def take(self, count: int) -> tuple:
        """Pop `count` values, in the order in which they were pushed."""
        start = len(self.stack) - count
        if start < 0:
            raise IndexError
        values = tuple(self.stack[start:])
        del self.stack[start:]
        return values

    def take_marked(self) -> tuple:
        """Pop the values above the last mark."""
        return self.take(len(self.stack) - self.marks.pop())

    def put_items(self, items: tuple) -> None:
        """Set keys of the dict below: names, each once."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _RefusedError("items of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise _RefusedError(f"a key that is no name, or is there twice ({_told(key)})")
            target[key] = value

    def append(self, values: tuple) -> None:
        if type(self.stack[-1]) is not list:
            raise _RefusedError("an item appended to something that is no list")
        self.stack[-1].extend(values)

    def make(self) -> None:
        """Where Python's unpickler calls a function: one of three, or nothing."""
        function, arguments = self.take(2)
        if type(function) is not Global or type(arguments) is not tuple:
            raise _RefusedError("a call of something that is no function")
        if function.name not in _MAKERS:
            raise _RefusedError(f"a call of {function.name}")
        self.push(_MAKERS[function.name](*arguments))

    def set_state(self) -> None:
        """An OrderedDict's attributes (modules' version numbers) are not needed."""
        target, _ = self.take(2)
        if type(target) is not dict:
            raise _RefusedError("attributes of something that is no dict")
        self.push(target)

    def refer(self) -> None:
        """A persistent id: ("storage", type, key, device, count)."""
        (told,) = self.take(1)
        word, kind, key, _device, count = told
        if word != "storage" or type(kind) is not Global or type(key) is not str:
            raise _RefusedError(f"a reference to {_told(word)}")
        if not (match := _STORAGE.fullmatch(kind.name)):
            raise _RefusedError(f"a storage of type {kind.name}")
        self.push(Storage(match[2], key, count))


def _told(value: Any) -> str:
    return f"{value[:80]!r}" if type(value) is str else f"a value of type {type(value).__name__}"


def _global(name: str) -> Global:
    if name not in _MAKERS and not _STORAGE.fullmatch(name):
        raise _RefusedError(f"the name {name[:200]!r}")
    return Global(name)


def _tensor(storage, offset, shape, strides, _requires_grad, _hooks, metadata=None) -> Tensor:
    if type(storage) is not Storage:
        raise _RefusedError("a tensor without a storage")
    if metadata:
        raise _RefusedError("a tensor with metadata (a conjugate, for instance)")
    return Tensor(storage, offset, shape, strides)


def _parameter(tensor, _requires_grad, _hooks) -> Tensor:
    if type(tensor) is not Tensor:
        raise _RefusedError("a parameter that is no tensor")
    return tensor


# A call of this name -> what is done in its place.
_MAKERS: dict[str, Callable[..., Any]] = {
    _ORDERED_DICT: lambda: {},
    _TENSOR: _tensor,
    _PARAMETER: _parameter,
}

_Instruction = Callable[[_Machine, Any], Any]


_NOTHING = ("PROTO", "FRAME", "STOP")
_ARGUMENTS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")

# Opcode -> what it does. Protocol 2, which PyTorch writes, and what 4 has in its place.
_INSTRUCTIONS: dict[str, _Instruction] = {
    **dict.fromkeys(_NOTHING, lambda m, _: None),
    **dict.fromkeys(_ARGUMENTS, lambda m, argument: m.push(argument)),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, i: m.memo.update({i: m.stack[-1]})),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, i: m.push(m.memo[i])),
    "MEMOIZE": lambda m, _: m.memo.update({len(m.memo): m.stack[-1]}),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "TUPLE1": lambda m, _: m.push(m.take(1)),
    "TUPLE2": lambda m, _: m.push(m.take(2)),
    "TUPLE3": lambda m, _: m.push(m.take(3)),
    "TUPLE": lambda m, _: m.push(m.take_marked()),
    "APPEND": lambda m, _: m.append(m.take(1)),
    "APPENDS": lambda m, _: m.append(m.take_marked()),
    "SETITEM": lambda m, _: m.put_items(m.take(2)),
    "SETITEMS": lambda m, _: m.put_items(m.take_marked()),
    "GLOBAL": lambda m, name: m.push(_global(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda m, _: m.push(_global(".".join(m.take(2)))),
    "REDUCE": lambda m, _: m.make(),
    "BUILD": lambda m, _: m.set_state(),
    "BINPERSID": lambda m, _: m.refer(),
}
