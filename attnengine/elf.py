"""What a shared object offers and needs, read from its ELF tables: nothing of it is executed.

For modules of an instruction set that this machine does not have. Layout: System V gABI, 64-bit
little endian; symbol versions: Linux Standard Base 5.0, "Symbol Versioning".
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_DYNAMIC, _DYNSYM, _VERSYM = 6, 11, 0x6FFFFFFF  # section types
_NEEDED = 1  # tag in the dynamic section
_WEAK = 2  # symbol binding


@dataclass(frozen=True)
class SharedObject:
    """``defined``: symbols that others may use. ``needed``: libraries that the loader brings along.
    ``unbound``: symbols it refers to that were in none of them when it was linked."""

    defined: frozenset[str]
    needed: tuple[str, ...]
    unbound: tuple[str, ...]


@dataclass(frozen=True)
class _Section:
    kind: int
    data: bytes
    link: int
    entry_bytes: int


def read_shared_object(data: bytes) -> SharedObject:
    """Reads a file's bytes. Raises ValueError when they are no 64-bit little-endian library."""
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:
        raise ValueError("not a 64-bit little-endian ELF file")
    try:
        sections = list(_sections(data))
        return _described(sections)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"truncated or malformed ELF file: {error}") from None


def _sections(data: bytes) -> Iterator[_Section]:
    (table,) = struct.unpack_from("<Q", data, 40)
    entry_bytes, count = struct.unpack_from("<HH", data, 58)
    for number in range(count):
        kind, _, _, start, size, link, _, _, step = struct.unpack_from(
            "<IQQQQIIQQ", data, table + number * entry_bytes + 4
        )
        content = data[start : start + size]
        if kind in (_DYNAMIC, _DYNSYM, _VERSYM) and len(content) < size:
            raise IndexError(f"section {number} ends after the file")
        yield _Section(kind, content, link, step)


def _described(sections: list[_Section]) -> SharedObject:
    by_kind = {section.kind: section for section in sections}
    if _DYNSYM not in by_kind or _DYNAMIC not in by_kind:
        raise IndexError("no dynamic symbols: not a shared object")
    symbols, dynamic = by_kind[_DYNSYM], by_kind[_DYNAMIC]
    names = sections[symbols.link].data
    versions = by_kind[_VERSYM].data if _VERSYM in by_kind else b""
    defined, unbound = set(), []
    for number in range(1, len(symbols.data) // 24):
        name_at, info, _, section = struct.unpack_from("<IBBH", symbols.data, number * 24)
        name = _text(names, name_at)
        if section != 0:
            defined.add(name)
            continue
        # The linker gives a version above 1 to what it found in a library; ours are all versioned.
        version = struct.unpack_from("<H", versions, number * 2)[0] & 0x7FFF if versions else 0
        if version < 2 and info >> 4 != _WEAK:
            unbound.append(name)
    libraries = sections[dynamic.link].data
    tags = struct.iter_unpack("<qQ", dynamic.data)
    needed = tuple(_text(libraries, value) for tag, value in tags if tag == _NEEDED)
    return SharedObject(frozenset(defined), needed, tuple(unbound))


def _text(table: bytes, start: int) -> str:
    return table[start : table.index(b"\0", start)].decode() if start < len(table) else ""
