"""The CUDA compiler: which toolkit, exactly which version, and one compile of a CUDA unit.

A toolkit is a folder with bin/nvcc and bin/ptxas. Its commands run without a shell, from a closed
list of flags, in a private folder, and without the variables through which nvcc takes more flags.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from attnengine import cutlass, settings
from attnengine.compiler import (
    Compiler,
    failure,
    find_compiler,
    identified,
    is_plain_path,
)
from attnengine.cutlass import Cutlass

# C++20 came with 12.0. The kernels have been compiled by 13.0 and 13.4, and their PTX by the ptxas
# of 12.4, without spills; none older was at hand.
AT_LEAST = (12, 4)
_USUAL = Path("/usr/local/cuda")
_OWN_FLAGS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
REMEDY = (
    "pip install 'attnengine[cuda13]', or set CUDA_HOME to a CUDA toolkit "
    f"{AT_LEAST[0]}.{AT_LEAST[1]} or newer"
)


@dataclass(frozen=True)
class Toolkit:
    """One CUDA toolkit, where it was found, and why it cannot be used, if so."""

    home: str
    found: str
    version: str
    problem: str | None = None


@dataclass(frozen=True)
class DeviceCompiler:
    """All that takes part in compiling a CUDA unit."""

    home: Path
    nvcc: Compiler
    ptxas: Compiler
    host: Compiler  # nvcc preprocesses with it
    cutlass: Cutlass
    headers: str  # hash of CUTLASS's

    def identity(self) -> dict[str, object]:
        """What goes into a kernel's key."""
        parts = {"nvcc": self.nvcc, "ptxas": self.ptxas, "host": self.host}
        known: dict[str, object] = {name: part.identity() for name, part in parts.items()}
        return {**known, "cutlass": self.headers}


def toolkits() -> tuple[Toolkit, ...]:
    """The CUDA toolkits of this machine in the order of preference: the one of CUDA_HOME, that of
    the nvcc on PATH, pip's packages beside this Python, /usr/local/cuda."""
    homes: list[tuple[Path, str]] = []
    explicit = settings.cuda_home()
    if explicit is not None:
        homes.append((Path(os.path.abspath(explicit[1])), explicit[0]))
    nvcc = shutil.which("nvcc", path=settings.search_path())
    if nvcc is not None:
        homes.append((_top(os.path.abspath(nvcc)), "PATH"))
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        homes += [(p, "pip packages") for p in sorted(Path(place).glob("cu[0-9]*"), reverse=True)]
    homes.append((_USUAL, str(_USUAL)))
    found: dict[str, Toolkit] = {}
    for home, origin in homes:
        if (home / "bin" / "nvcc").is_file():
            found.setdefault(str(home.resolve()), _described(home, origin))
    return tuple(found.values())


def _described(home: Path, origin: str) -> Toolkit:
    text = f"{home} (from {origin})"
    try:
        answer = _asked(str(home / "bin" / "nvcc"), "--version").version
        number = re.search(r"release (\d+)\.(\d+)", answer)
    except (OSError, subprocess.SubprocessError):
        number = None
    if number is None:
        version = "unknown: nvcc --version does not run"
        return Toolkit(
            str(home), origin, version, f"nvcc --version does not run in {text}; {REMEDY}"
        )
    version, problem = f"{number[1]}.{number[2]}", None
    if (int(number[1]), int(number[2])) < AT_LEAST:
        problem = (
            f"nvcc {version} in {text} is too old: the kernels need {AT_LEAST[0]}.{AT_LEAST[1]} or "
            f"newer (C++20, __grid_constant__ parameters); {REMEDY}"
        )
    elif not (home / "bin" / "ptxas").is_file():
        problem = f"{text} has nvcc but no bin/ptxas: the toolkit is incomplete; {REMEDY}"
    elif not is_plain_path(home):
        problem = f"the path of {text} has characters that nvcc's shell would change; {REMEDY}"
    return Toolkit(str(home), origin, version, problem)


def _asked(command: str, *question: str) -> Compiler:
    return identified(command, *question, without=_OWN_FLAGS)


def _top(nvcc: str) -> Path:
    """The toolkit of an nvcc on PATH: what nvcc says itself, since it may be a wrapper script."""
    try:
        answer = _asked(nvcc, "--dryrun", "x.cu").version
    except (OSError, subprocess.SubprocessError):
        answer = ""
    top = re.search(r"TOP=(\S+)", answer)
    return Path(os.path.normpath(top[1])) if top else Path(nvcc).resolve().parents[1]


def find_device_compiler() -> DeviceCompiler | str:
    """The toolkit, C++ compiler and CUTLASS headers to use, or a sentence that says what is missing
    and what to do. A toolkit that the user points at is used or refused, never passed over."""
    found, explicit = toolkits(), settings.cuda_home()
    if explicit is not None:
        found = tuple(t for t in found if t.found == explicit[0])
        if not found:
            return f"no CUDA compiler: {explicit[0]}={explicit[1]!r} has no bin/nvcc; {REMEDY}"
    usable = [toolkit for toolkit in found if toolkit.problem is None]
    if not usable:
        if found:
            return str(found[0].problem)
        return (
            "no CUDA compiler: CUDA_HOME and CUDA_PATH are unset, nvcc is not on "
            f"PATH={settings.search_path()}, not among the pip packages beside this Python and not "
            f"in {_USUAL}; {REMEDY}"
        )
    home, host, templates = Path(usable[0].home), find_compiler(), cutlass.find_cutlass()
    if not isinstance(host, Compiler):
        return f"nvcc needs a C++ compiler: {host}; install g++ 11 or newer, or set ATTNENGINE_CXX"
    if not isinstance(templates, Cutlass):
        return templates
    try:
        nvcc = _asked(str(home / "bin" / "nvcc"), "--version")
        ptxas = _asked(str(home / "bin" / "ptxas"), "--version")
    except (OSError, subprocess.SubprocessError) as error:
        return f"the CUDA toolkit {home} does not run: {error}; {REMEDY}"
    return DeviceCompiler(home, nvcc, ptxas, host, templates, cutlass.contents(templates))


def run(command: list[str], folder: Path, seconds: float) -> str:
    """Runs one command of the toolkit in a folder and returns what it printed. Everything that it
    starts ends with it. Raises CompileFailed, or OSError when the folder is full."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = settings.child_environment(_OWN_FLAGS, LC_ALL="C", TMPDIR=str(temporary))
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        overdue = False
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            overdue = True
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    log = output.decode(errors="replace")
    if process.returncode != 0 or overdue:
        raise failure(log, overdue, settings.build_timeout_s())
    return log
