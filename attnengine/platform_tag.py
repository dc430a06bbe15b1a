"""The platform of a wheel, read from its binaries: the oldest Linux that can load them.

Imports nothing of ours, so that setup.py can load this file before the package is built.
"""

import platform
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

# The C library of the first distribution whose libstdc++ has this GLIBCXX_3.4.x: the manylinux
# policies of PyPA's auditwheel.
_GLIBC_OF_LIBSTDCXX = {19: 17, 22: 24, 24: 27, 28: 31, 29: 34, 30: 35, 33: 39}
_OLDEST = 17  # manylinux_2_17: torch has not run on anything older for years


def platform_tag(libraries: Iterable[Path]) -> str:
    """The wheel platform of shared objects, such as ``manylinux_2_34_x86_64``: the newest GLIBC and
    GLIBCXX symbol version that any of them refers to. Without glibc, the interpreter's own platform
    (``linux_x86_64``)."""
    if platform.libc_ver()[0] != "glibc":
        return re.sub(r"[-.]", "_", sysconfig.get_platform())
    minor = _OLDEST
    for library in libraries:
        data = library.read_bytes()
        for found in re.findall(rb"\0GLIBC_2\.(\d+)", data):
            minor = max(minor, int(found))
        for found in re.findall(rb"\0GLIBCXX_3\.4\.(\d+)", data):
            fitting = [libc for cxx, libc in _GLIBC_OF_LIBSTDCXX.items() if cxx >= int(found)]
            # Newer than the table: no older system is known to have it.
            minor = max(minor, min(fitting, default=int(platform.libc_ver()[1].split(".")[1])))
    return f"manylinux_2_{minor}_{platform.machine().lower()}"
