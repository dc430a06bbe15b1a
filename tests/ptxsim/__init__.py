"""A simulator of PTX: runs the kernels that nvcc compiles, on the CPU, and reports what hardware
would let pass. It supplies the table of CUDA driver functions (csrc/driver.h), so that the launcher
uses it as it uses a GPU:

    ptxsim.install()             # from now on CPU tensors can be given to CUDA kernels
    ptxsim.seed(7)               # another order of warps, another moment for copies to land
    ptxsim.counters()            # of this thread's latest launch

`run` launches a kernel of a PTX text on arrays, for tests of instructions. The library is built
from the sources here when it is first needed."""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptxsim import library_build

Size = int | Sequence[int]


class Fault(RuntimeError):
    """A kernel did what it must not. `kind` is the report's first word, such as "race"."""

    def __init__(self, report: str) -> None:
        super().__init__(report)
        self.kind = report.split(":", 1)[0]


class Rejected(RuntimeError):
    """A text that cannot be decoded, or a launch that its kernel does not allow."""


class _Region(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("writable", ctypes.c_int32),
        ("name", ctypes.c_char_p),
    ]


class ReadOnly:
    """An array that the kernel may only read."""

    def __init__(self, array: Any) -> None:
        self.array = array


_LAUNCH_FAILED = 719


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library_build.library_path()))
    lib.ptxsim_driver.restype = ctypes.c_void_p
    lib.ptxsim_counters.restype = ctypes.c_char_p
    lib.ptxsim_report.restype = ctypes.c_char_p
    lib.ptxsim_set_seed.argtypes = [ctypes.c_uint64]
    lib.ptxsim_set_instruction_limit.argtypes = [ctypes.c_uint64]
    return lib


def install() -> None:
    """Makes the launcher use the simulator in place of libcuda."""
    from attnengine import library as product

    product.install_driver(str(library_build.library_path()))


def seed(value: int) -> None:
    """Of the launches that follow: the order in which warps run and when copies land."""
    library().ptxsim_set_seed(value)


def threads(count: int) -> None:
    """Host threads of a launch; 0: as many as the machine has. Results do not depend on it."""
    library().ptxsim_set_threads(count)


def instruction_limit(count: int) -> None:
    """Instructions of its warps after which a thread block counts as one that does not end; 0: as
    many as it runs in half a minute or so."""
    library().ptxsim_set_instruction_limit(count)


def device(capability: int, multiprocessors: int = 108) -> None:
    """What the simulated device is: 80 for sm_80."""
    library().ptxsim_set_device(capability, multiprocessors)


def counters() -> dict[str, Any]:
    """What the latest launch of this thread did (counters.h)."""
    return json.loads(library().ptxsim_counters())


def report() -> str:
    """Why this thread's latest failed call failed."""
    return library().ptxsim_report().decode()


def _three(size: Size) -> Any:
    values = [size] if isinstance(size, int) else list(size)
    return (ctypes.c_uint32 * 3)(*values, *[1] * (3 - len(values)))


def _address(array: Any) -> tuple[int, int]:
    if isinstance(array, np.ndarray):
        if not array.flags.c_contiguous:
            raise ValueError("an argument is not contiguous")
        return array.ctypes.data, array.nbytes
    return array.data_ptr(), array.untyped_storage().nbytes()


def _value(argument: Any, index: int, regions: list[_Region]) -> bytes:
    """An argument's bytes in parameter space; arrays are passed as addresses."""
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, (bool, int, np.integer, np.floating, float)):
        if isinstance(argument, (bool, int)):
            argument = np.int32(argument)
        elif not isinstance(argument, (np.integer, np.floating)):
            argument = np.float32(argument)
        return argument.tobytes()
    writable = not isinstance(argument, ReadOnly)
    address, size = _address(argument if writable else argument.array)
    regions.append(_Region(address, size, writable, f"argument {index}".encode()))
    return address.to_bytes(8, "little")


def run(
    ptx: str,
    entry: str,
    grid: Size,
    block: Size,
    args: Sequence[Any],
    *,
    shared: int = 0,
    seed: int = 0,
) -> None:
    """Launches a kernel. Arguments: arrays of numpy or torch (passed as addresses, and all that
    the kernel may touch), ReadOnly arrays, numbers of numpy (int is int32, float is float32), bytes
    of a structure. Raises Fault or Rejected."""
    lib = library()
    regions: list[_Region] = []
    values = [_value(argument, i, regions) for i, argument in enumerate(args)]
    buffers = [ctypes.create_string_buffer(value, len(value)) for value in values]
    pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(b) for b in buffers])
    sizes = (ctypes.c_uint32 * max(1, len(values)))(*[len(value) for value in values])
    lib.ptxsim_set_seed(seed)
    result = lib.ptxsim_run(
        ptx.encode(),
        entry.encode(),
        _three(grid),
        _three(block),
        shared,
        len(values),
        pointers,
        sizes,
        len(regions),
        (_Region * max(1, len(regions)))(*regions),
    )
    if result == _LAUNCH_FAILED:
        raise Fault(report())
    if result != 0:
        raise Rejected(report())
