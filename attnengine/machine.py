"""Facts about this machine: torch, processor, compiler, CUDA, cache and prebuilt kernels.

Functions return frozen values and do not raise: what is wrong is in ``problem``, in a sentence that
says what to do. Nothing here needs the operator library to be there.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from attnengine import cache_upkeep, cutlass, nvcc, prebuilt, settings
from attnengine.cache import Store
from attnengine.cache_entry import verify
from attnengine.compiler import Compiler, find_compiler
from attnengine.errors import AttnEngineError, CacheError
from attnengine.nvcc import DeviceCompiler, Toolkit
from attnengine.staging import build_id, compile_unit, flags, name_unit

TORCH_AT_LEAST = (2, 11)

_TRIVIAL = """
#include "common/abi.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT const ae_module_info* ae_info(void) {
  static const ae_module_info info = {AE_ABI_VERSION, sizeof(ae_params)};
  return &info;
}
EXPORT int64_t ae_workspace_bytes(const ae_params*) { return 0; }
EXPORT int32_t ae_launch(const ae_params*, void*, ae_parallel_for) { return 0; }
"""
_TRIVIAL_CUDA = """// manifest: {"kind": "trial", "threads": 32, "shared_bytes": 0}
extern "C" __global__ void ae_trial(const __grid_constant__ int x, int* y) { *y = x; }
"""


@dataclass(frozen=True)
class Torch:
    """``version`` is None when torch is not installed."""

    version: str | None
    problem: str | None = None


@dataclass(frozen=True)
class OperatorLibrary:
    """The compiled operators, and the torch that loaded them."""

    path: str
    torch: str | None
    isa: str | None  # the best instruction set of this processor
    problem: str | None = None


@dataclass(frozen=True)
class Processor:
    """``usable`` hardware threads may be used by this process; ``asked`` is ATTNENGINE_ISA."""

    name: str
    usable: int
    cores: int
    threads: int | None  # of torch's pool
    asked: str | None
    problem: str | None = None


@dataclass(frozen=True)
class HostCompiler:
    """The C++ compiler; ``works`` says that it made a module which was loaded again."""

    command: str | None
    version: str | None
    flags: tuple[str, ...]
    works: bool
    disabled: bool  # by ATTNENGINE_DISABLE_JIT
    problem: str | None = None


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver describes it; ``capability`` 9.0 is sm_90."""

    name: str
    capability: str


@dataclass(frozen=True)
class Cuda:
    """Toolkits in the order of preference, CUTLASS's headers, and the driver's GPUs. ``works`` says
    that a CUDA module was made; ``problem`` why not."""

    toolkits: tuple[Toolkit, ...]
    cutlass: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]
    works: bool
    problem: str | None = None


@dataclass(frozen=True)
class Cache:
    """The user's cache; ``broken`` are the problems of entries, every hash checked."""

    root: str
    writable: bool
    modules: int
    bytes: int
    limit: int
    broken: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class PrebuiltFolder:
    """One folder of ready kernels; ``source`` is ATTNENGINE_AOT_PATH or an installed wheel."""

    root: str
    source: str
    modules: int
    isas: tuple[str, ...]
    broken: tuple[str, ...] = ()
    problem: str | None = None


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_facts() -> Torch:
    """torch's version and whether the operator library supports it."""
    version = installed_version("torch")
    least = ".".join(map(str, TORCH_AT_LEAST))
    if version is None:
        return Torch(None, f"torch is not installed: pip install 'torch>={least}'")
    number = re.match(r"(\d+)\.(\d+)", version)
    if number and tuple(map(int, number.groups())) < TORCH_AT_LEAST:
        return Torch(version, f"torch {least} or newer is needed: pip install -U torch")
    return Torch(version)


def operator_facts() -> OperatorLibrary:
    """Loads the operator library into this process."""
    path = Path(__file__).resolve().parent / "libattnengine_ops.so"
    try:
        library = importlib.import_module("attnengine.library")
        torch = importlib.import_module("torch")
        return OperatorLibrary(str(path), str(torch.__version__), library.cpu_isa())
    except (ImportError, OSError, AttributeError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if path.exists():
            text += "; it was built for another Python, or torch is too old: build it again"
        return OperatorLibrary(str(path), None, None, text)


def processor_facts(isa: str | None) -> Processor:
    """``isa`` is the best instruction set that the operator library found."""
    usable = os.sched_getaffinity(0)
    cores = set()
    for cpu in usable:
        place = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            core = (place / "core_id").read_text(), (place / "physical_package_id").read_text()
        except OSError:
            core = (str(cpu), "")
        cores.add(core)
    threads = None
    if importlib.util.find_spec("torch") is not None:
        threads = int(importlib.import_module("torch").get_num_threads())
    asked, problem = None, None
    try:
        asked = settings.isa_override()
    except ValueError as error:
        problem = f"{error}; unset it to use the best"
    if asked is not None and isa is not None:
        order = settings.ISAS
        if order.index(asked) > order.index(isa):
            problem = f"ATTNENGINE_ISA={asked} is beyond this processor ({isa}): unset it"
    return Processor(_processor_name(), len(usable), len(cores), threads, asked, problem)


def _processor_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def compiler_facts(isa: str | None) -> HostCompiler:
    """Finds the compiler and lets it make one small module, which a child process loads."""
    found, disabled = find_compiler(), False
    try:
        disabled = settings.jit_disabled()
        target = settings.isa_override() or isa or "portable"
    except ValueError as error:
        return HostCompiler(None, None, (), False, disabled, str(error))
    if not isinstance(found, Compiler):
        remedy = "install g++ 11 or newer, or set ATTNENGINE_CXX"
        return HostCompiler(None, None, (), False, disabled, f"{found}; {remedy}")
    version = found.version.strip().splitlines()[-1]
    why = _trial_problem(_TRIVIAL, target, found)
    if why is not None:
        remedy = "install g++ 11 or newer with its C++ headers, or set ATTNENGINE_CXX to another"
        return HostCompiler(found.command, version, (), False, disabled, f"{why}; {remedy}")
    return HostCompiler(found.command, version, flags(target), True, disabled)


def cuda_facts() -> Cuda:
    """Toolkits, CUTLASS, GPUs, and whether CUDA kernels are made: one small module is. A machine
    without any of them runs attention on the CPU."""
    driver, gpus = _gpus()
    headers, found = cutlass.find_cutlass(), nvcc.find_device_compiler()
    named = None if isinstance(headers, str) else f"{headers.version} in {headers.include}"
    problem = found if isinstance(found, str) else _trial_problem(_TRIVIAL_CUDA, "sm_80", found)
    return Cuda(nvcc.toolkits(), named, driver, gpus, problem is None, problem)


def _trial_problem(source: str, isa: str, compiler: Compiler | DeviceCompiler) -> str | None:
    """Why a compiler makes no module of a small source, or None."""
    try:
        unit = name_unit(source, isa, "attnengine doctor")
        with tempfile.TemporaryDirectory(prefix="attnengine-") as folder:
            store = Store(Path(folder) / "cache")
            store.prepare()
            compile_unit(store, unit, unit.digest or unit.content, compiler)
    except (AttnEngineError, OSError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        if isinstance(error, OSError):
            text[0] = f"it made no module ({text[0]})"
        return text[0] + "".join(f"; {x.strip()}" for x in text[1:] if "error:" in x)[:300]
    return None


def _gpus() -> tuple[str | None, tuple[Gpu, ...]]:
    """(CUDA version of the driver, GPUs) through the driver's library; (None, ()) without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        version, count = ctypes.c_int(), ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None, ()
        text = f"{version.value // 1000}.{version.value % 1000 // 10}"
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return text, ()
        found = []
        for at in range(count.value):
            device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
            major, minor = ctypes.c_int(), ctypes.c_int()
            driver.cuDeviceGet(ctypes.byref(device), at)
            driver.cuDeviceGetName(name, 256, device)
            driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CAPABILITY_MAJOR
            driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # CAPABILITY_MINOR
            found.append(Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}"))
        return text, tuple(found)
    except (OSError, AttributeError):
        return None, ()


def cache_facts() -> Cache:
    """The state of the user's cache, every file's hash checked."""
    store = Store(settings.cache_dir())
    try:
        limit = settings.cache_limit_bytes()
        store.prepare()
        entries = cache_upkeep.modules(store, check=True)
        used = cache_upkeep.total_bytes(store)
    except (OSError, ValueError, AttnEngineError) as error:
        why = (
            f"{error}; kernels are compiled again in every process: set ATTNENGINE_CACHE_DIR to a "
            "folder of yours that can be written"
        )
        return Cache(str(store.root), False, 0, 0, 0, (), why)
    broken = tuple(e.problem for e in entries if e.problem is not None)
    problem = None
    if broken:
        problem = f"{len(broken)} entries are broken: attnengine cache verify --repair removes them"
    return Cache(str(store.root), True, len(entries) - len(broken), used, limit, broken, problem)


def prebuilt_facts() -> tuple[PrebuiltFolder, ...]:
    """Every folder of ready kernels, each module checked."""
    asked = settings.aot_paths()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same in words below
        fits = prebuilt.folders(build_id())
    found = []
    for root in (*asked, *prebuilt.installed()):
        source = "ATTNENGINE_AOT_PATH" if root in asked else "installed wheel"
        isas, broken = [], []
        for folder in sorted(Store(root).entries.glob("[0-9a-f][0-9a-f]/*")):
            try:
                isas.append(str(verify(folder, shared=True).get("isa", "")))
            except (OSError, CacheError) as error:
                broken.append(str(error))
        problem = None
        if root not in fits:
            problem = "made for another build of attnengine: run attnengine prebuild again"
        elif broken:
            problem = f"{len(broken)} modules are altered: run attnengine prebuild again"
        elif not isas:
            problem = f"no kernels in it: run attnengine prebuild --specs builtin --out {root}"
        good = len(isas) if root in fits else 0
        kinds = tuple(sorted(set(isas)))
        found.append(PrebuiltFolder(str(root), source, good, kinds, tuple(broken), problem))
    return tuple(found)
