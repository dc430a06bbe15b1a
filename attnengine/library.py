"""The compiled operator library: loads it, and speaks to its kernel registry.

Importing this module registers ``torch.ops.attnengine.forward`` and ``.backward``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnengine import settings
from attnengine.staging import templates_dir as templates_dir

PACKAGE = pathlib.Path(__file__).resolve().parent
OPS_LIBRARY = PACKAGE / "libattnengine_ops.so"

# ae_dtype of templates/common/abi.h
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.int16: 6,
    torch.int8: 7,
    torch.uint8: 8,
    torch.bool: 9,
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
TILE_CLASSES = ("empty", "partial", "full")


def _load() -> Any:
    if not OPS_LIBRARY.exists():
        raise ImportError(
            f"{OPS_LIBRARY} is missing: the operator library is not built; in a checkout run "
            "`make .venv` (or `pip install --no-build-isolation -e .`)"
        )
    torch.ops.load_library(str(OPS_LIBRARY))
    from attnengine import _host

    _host.set_sync_debug(settings.sync_debug())
    return _host


host: Any = _load()


@dataclass(frozen=True)
class CudaLaunch:
    """How a CUDA kernel is launched: ``threads`` and ``shared_bytes`` of dynamic shared memory per
    thread block, tiles of ``block_m`` rows and ``block_n`` keys; with ``pack_group`` the query
    heads of one key head share a tile of rows; bit i of ``mask_captures`` says that the mask reads
    captured tensor i. ``sequences``: it serves sequences of any lengths; ``slot_bytes`` of a part
    of a result, 0 where keys are never split; ``tile_cycles``, predicted, of a tile of keys;
    ``shared_kv``: v is the first columns of k; ``crowded`` outputs per worker are not split.
    """

    threads: int
    shared_bytes: int
    block_m: int
    block_n: int
    pack_group: bool
    mask_captures: int
    sequences: bool = False
    slot_bytes: int = 0
    tile_cycles: int = 0
    shared_kv: bool = False
    crowded: int = 0


@dataclass(frozen=True)
class KernelInfo:
    """What a loaded kernel module says of itself.

    ``user_stats`` of its ``stats`` saved row statistics are meant for the caller; bit i of
    ``grad_mask`` says that a backward kernel produces the gradient of captured tensor i;
    ``captures`` is the (rank, dtype) of each captured tensor, empty when load_kernel was not told;
    ``isa`` is the instruction set, which of a CUDA kernel is its target, as sm_80.
    """

    kind: str
    dtype: torch.dtype
    D: int
    Dv: int
    capture_count: int
    user_stats: int
    stats: int
    grad_mask: int
    isa: str
    key: str
    path: str
    captures: tuple[tuple[int, torch.dtype], ...]
    cuda: CudaLaunch | None = None


def load_kernel(
    path: str | os.PathLike[str], captures: Iterable[tuple[int, torch.dtype]] | None = None
) -> int:
    """Load the kernel module at ``path`` and return its id, the same for the same path.

    ``captures`` gives rank and dtype of each captured tensor that the module was generated for;
    with it the operators refuse tensors that the module would read wrongly. The caller has verified
    the file. Raises RuntimeError when it is no kernel module of this ABI or needs instructions that
    this CPU lacks.
    """
    signature = None if captures is None else [(r, DTYPE_CODES[t]) for r, t in captures]
    return host.load_kernel(os.path.abspath(path), signature)


# Names of element types in kernel keys and manifests.
_ELEMENTS = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
_CUDA_FIELDS = (
    *("head_dim", "value_dim", "capture_count", "user_stats", "stats", "mask_captures"),
    *("block_m", "block_n", "pack_group", "threads", "shared_bytes"),
)
# Of kernels of sequences alone.
_SEQUENCE_FIELDS = ("sequences", "slot_bytes", "tile_cycles", "shared_kv", "crowded")

# Of linear attention alone.
_LINEAR_FIELDS = ("state_bytes", "split_bytes")
_CUDA_KINDS = {"forward": 0, "linear_forward": 2}  # ae_kind


def load_cuda_kernel(
    ptx: str | os.PathLike[str],
    cubin: str | os.PathLike[str] | None,
    manifest: Mapping[str, Any],
    captures: Iterable[tuple[int, torch.dtype]] | None = None,
) -> int:
    """Load a CUDA kernel's PTX and cubin; returns its id, the same for the same PTX path.

    ``manifest`` is what the build wrote to cuda.json; ``captures`` as in load_kernel. The caller
    has verified the files. No GPU is needed: a device's driver takes an image at the first call on
    the device, the cubin where it fits and else the PTX. Raises ValueError when the manifest lacks
    something, RuntimeError when a file cannot be read.
    """
    path = os.path.abspath(ptx)
    try:
        numbers = {name: int(manifest[name]) for name in _CUDA_FIELDS}
        numbers |= {name: int(manifest.get(name, 0)) for name in _SEQUENCE_FIELDS}
        kind, key, target = manifest["kind"], str(manifest["key"]), str(manifest["target"])
        element = manifest["dtype"]
    except KeyError as error:
        raise ValueError(
            f"{path}: its manifest has no {error}; clear the cache with: attnengine cache clear"
        ) from None
    if kind not in _CUDA_KINDS:
        raise ValueError(
            f"{path}: its manifest says kind={kind!r}; CUDA kernels are "
            f"{' or '.join(map(repr, _CUDA_KINDS))}"
        )
    if element not in _ELEMENTS:
        raise ValueError(
            f"{path}: its manifest says dtype={element!r}; expected {', '.join(_ELEMENTS)}"
        )
    digits = target.removeprefix("sm_").rstrip("af")
    if not target.startswith("sm_") or not digits.isdecimal():
        raise ValueError(f"{path}: its manifest says target={target!r}; expected sm_80 or alike")
    numbers |= {name: int(manifest.get(name, 0)) for name in _LINEAR_FIELDS}
    numbers["kind"] = _CUDA_KINDS[kind]
    numbers |= {"dtype": DTYPE_CODES[_ELEMENTS[element]], "target": int(digits)}
    signature = None if captures is None else [(r, DTYPE_CODES[t]) for r, t in captures]
    images = path, "" if cubin is None else os.path.abspath(cubin)
    return host.load_cuda_kernel(*images, key, numbers, signature)


def install_driver(path: str | os.PathLike[str] | None, symbol: str = "ptxsim_driver") -> None:
    """Use the driver table of the shared object at ``path`` in place of this machine's.

    ``symbol`` is the function that returns it. A table named "simulator" runs CUDA kernels on CPU
    tensors. None takes the installed table out again. Raises OSError when the file cannot be
    loaded, RuntimeError when it has no such function or was built for another version.
    """
    if path is None:
        host.install_driver(0)
        return
    loaded = ctypes.CDLL(os.path.abspath(path))
    try:
        getter = getattr(loaded, symbol)
    except AttributeError:
        raise RuntimeError(f"{path} has no function {symbol}: it is no driver") from None
    getter.restype = ctypes.c_void_p
    host.install_driver(getter())


def driver_name() -> str:
    """What runs CUDA kernels: "simulator" when one is installed, "cuda" with a CUDA driver, else
    "none"."""
    return host.driver_name()


def device_capability(index: int) -> int:
    """Compute capability of CUDA device ``index``: 80 is 8.0. Raises RuntimeError without one."""
    return host.device_capability(index)


@functools.cache
def kernel_info(kernel: int) -> KernelInfo:
    """The description of a loaded kernel. Raises ValueError when no kernel has this id."""
    info = host.kernel_info(kernel)
    captures = tuple((rank, DTYPES[code]) for rank, code in info["captures"])
    cuda = None if info["cuda"] is None else CudaLaunch(**info["cuda"])
    known = {**info, "dtype": DTYPES[info["dtype"]], "captures": captures, "cuda": cuda}
    return KernelInfo(**known)


def classify(
    kernel: int,
    sizes: Sequence[int],
    captures: Sequence[torch.Tensor] = (),
    *,
    b: int = 0,
    h: int = 0,
) -> np.ndarray:
    """The runs of KV tiles that a forward kernel walks for the rows of tiles of one query head.

    int32 [runs, 4] of (row of tiles, first KV tile, end, class); classes are those of
    TILE_CLASSES. ``sizes`` is (B, Hq, Hkv, L, S). Tiles in no run are empty: no key there is live.
    """
    tensors = [(t.data_ptr(), tuple(t.shape), t.stride(), DTYPE_CODES[t.dtype]) for t in captures]
    runs = host.classify(kernel, list(sizes), tensors, b, h)
    return np.frombuffer(runs, dtype=np.int32).reshape(-1, 4)


def workspace_bytes(
    kernel: int,
    sizes: Sequence[int],
    captures: Sequence[torch.Tensor] = (),
    *,
    shared_keys: bool = False,
    threads: int = 1,
) -> int:
    """Bytes of scratch that one launch of a kernel takes; nothing is allocated.

    ``sizes`` is (B, Hq, Hkv, L, S). ``shared_keys``: K and V have batch 1 and serve the whole
    batch. ``threads``: of the pool; small launches use one. Only the sizes, strides and types of
    ``captures`` are read. Raises ValueError when no kernel has this id or captures do not fit it.
    """
    tensors = [(0, tuple(t.shape), t.stride(), DTYPE_CODES[t.dtype]) for t in captures]
    return host.workspace_bytes(kernel, list(sizes), shared_keys, tensors, threads)


def cpu_isa() -> str:
    """Best instruction set of this CPU: avx512_bf16, avx512, avx2 or portable."""
    return host.cpu_isa()


def versions() -> dict[str, str]:
    """Versions that a bug report should carry."""
    return {
        "attnengine": importlib.metadata.version("attnengine"),
        "torch": torch.__version__,
        "cpu isa": cpu_isa(),
        "operator library": str(OPS_LIBRARY),
    }
