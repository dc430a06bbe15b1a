"""The kernel cache without a compiler: entries, texts, locks, upkeep, and everything that may be
wrong with a folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from attnengine import cache, cache_entry, cache_lock, cache_upkeep, settings
from attnengine.cache import Store
from attnengine.errors import CacheError

DIGEST = cache_entry.sha256(b"one")
OTHER = cache_entry.sha256(b"two")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith("ATTNENGINE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(tmp_path / "cache"))
    cache.forget()
    made = Store(tmp_path / "cache")
    made.prepare()
    yield made
    cache.forget()


def put(store: Store, digest: str = DIGEST, data: bytes = b"code", label: str = "a kernel") -> Path:
    with store.stage() as stage:
        entry = stage / "entry"
        entry.mkdir(mode=0o700)
        cache_entry.write_file(entry / "kernel.so", data)
        return store.publish(entry, digest, label, {"isa": "avx2"})


def test_published_entry_is_found_and_private(store: Store) -> None:
    path = put(store)
    assert path == store.entry(DIGEST) / "kernel.so" == cache.find(DIGEST)
    assert path.read_bytes() == b"code"
    for folder in (store.entries, path.parent.parent, path.parent, store.root / "tmp"):
        assert folder.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in path.parent.iterdir())
    assert list((store.root / "tmp").iterdir()) == []
    assert cache.find(OTHER) is None


def truncate(path: Path) -> None:
    os.truncate(path / "kernel.so", 2)


def overwrite(path: Path) -> None:
    (path / "kernel.so").write_bytes(b"evil")


def edit_manifest(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["label"] = "another"
    (path / "manifest.json").write_text(json.dumps(manifest))


def replace_consistently(path: Path) -> None:
    """Both file and hash changed, the seal not."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "kernel.so").write_bytes(b"evil")
    manifest["files"]["kernel.so"]["sha256"] = cache_entry.sha256(b"evil")
    (path / "manifest.json").write_text(json.dumps(manifest))


def half_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def no_kernel(path: Path) -> None:
    (path / "kernel.so").unlink()


def link(path: Path) -> None:
    (path / "kernel.so").rename(path / "elsewhere")
    (path / "kernel.so").symlink_to(path / "elsewhere")


def open_file(path: Path) -> None:
    (path / "kernel.so").chmod(0o666)


def open_folder(path: Path) -> None:
    path.chmod(0o770)


def foreign_owner(path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path / "kernel.so", 12345, 12345)


def not_a_folder(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    path.write_text("x")


def moved(path: Path) -> None:
    """A good entry under another name."""
    put(Store(path.parents[2]), OTHER)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    os.rename(path.parents[1] / OTHER[:2] / OTHER, path)


DAMAGES = [
    truncate, overwrite, edit_manifest, replace_consistently, half_manifest, no_manifest, no_kernel,
    link, open_file, open_folder, foreign_owner, not_a_folder, moved,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_entry_is_moved_aside_and_replaced(store: Store, damage) -> None:
    folder = put(store).parent
    damage(folder)
    with pytest.warns(RuntimeWarning, match="built again"):
        assert cache.find(DIGEST) is None
    assert not folder.exists()
    assert len(list((store.root / "quarantine").iterdir())) == 1
    assert put(store).exists()
    assert cache.find(DIGEST) is not None


def test_rename_loser_uses_the_winners_entry(store: Store) -> None:
    first = put(store, data=b"winner")
    assert put(store, data=b"loser") == first
    assert first.read_bytes() == b"winner"


def test_rename_loser_replaces_an_altered_winner(store: Store) -> None:
    truncate(put(store).parent)
    with pytest.warns(RuntimeWarning, match="bytes, its manifest says"):
        again = put(store, data=b"fresh")
    assert again.read_bytes() == b"fresh"


def test_hostile_label_is_made_harmless(store: Store) -> None:
    put(store, label='x"; rm -rf / #\n\x1b[31m$(touch /tmp/x)\u202e' + "y" * 500)
    (entry,) = cache_upkeep.modules(store)
    assert entry.label.startswith("x?; rm -rf / ??")
    assert len(entry.label) == 120 and entry.label.isprintable() and entry.label.isascii()


@pytest.mark.parametrize("text", ["", "plain", "ünï\n\0\ud800", '{"a": 1}'], ids=repr)
def test_text_round_trip(store: Store, text: str) -> None:
    assert cache.text_get("traced", DIGEST) is None
    cache.text_put("traced", DIGEST, text)
    assert cache.text_get("traced", DIGEST) == text
    cache.text_put("traced", DIGEST, text + "2")
    assert cache.text_get("traced", DIGEST) == text + "2"
    assert cache.text_get("plans", DIGEST) is None
    assert cache.text_get("traced", OTHER) is None


@pytest.mark.parametrize(
    "kind, digest",
    [("../x", DIGEST), ("Traced", DIGEST), ("", DIGEST), ("traced", "../../x"), ("traced", "ab")],
)
def test_text_names_are_checked(store: Store, kind: str, digest: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        cache.text_get(kind, digest)
    with pytest.raises(ValueError, match="expected"):
        cache.text_put(kind, digest, "x")


def test_altered_text_counts_as_absent(store: Store) -> None:
    cache.text_put("traced", DIGEST, "abc")
    path = store.entries / "text" / "traced" / f"{DIGEST}.json"
    good = path.read_text()
    other = path.with_name(f"{OTHER}.json")
    cache_entry.write_file(other, good.encode())  # right seal, wrong name
    assert cache.text_get("traced", OTHER) is None
    for bad in (good.replace("abc", "abd"), good[:-3], "", "[]", "null", '"x"', '{"text": 1}'):
        path.write_text(bad)
        assert cache.text_get("traced", DIGEST) is None
    path.write_text(good)
    assert cache.text_get("traced", DIGEST) == "abc"
    path.chmod(0o666)
    assert cache.text_get("traced", DIGEST) is None


@pytest.mark.parametrize("problem", ["below a file", "denied", "noexec", "open to all", "foreign"])
def test_unusable_cache_gives_one_warning_and_a_private_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    root = tmp_path / "unusable"
    if problem == "below a file":
        (tmp_path / "file").write_text("")
        root = tmp_path / "file" / "cache"
    elif problem == "denied":
        real = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: root not in (path, *path.parents))
        assert real(tmp_path, os.W_OK)
    elif problem == "noexec":
        real_statvfs = os.statvfs
        flags = type("Flags", (), {"f_flag": os.ST_NOEXEC})
        monkeypatch.setattr(
            os, "statvfs", lambda path: flags if root in path.parents else real_statvfs(path)
        )
    elif problem == "open to all":
        (root / "1").mkdir(parents=True)
        (root / "1").chmod(0o777)
    elif os.getuid() == 0:
        (root / "1").mkdir(parents=True, mode=0o700)
        os.chown(root / "1", 12345, 12345)
    else:
        pytest.skip("only root can give a folder away")
    monkeypatch.setenv("ATTNENGINE_CACHE_DIR", str(root))
    cache.forget()
    with pytest.warns(RuntimeWarning, match="cannot be used") as caught:
        path = cache.writable(put)
    assert root not in path.parents and path.exists()
    assert path.parents[3].stat().st_mode & 0o077 == 0
    assert str(path.parents[3]) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.find(DIGEST) == path
        cache.text_put("traced", DIGEST, "abc")
        assert cache.text_get("traced", DIGEST) == "abc"
    cache.discard(Store(path.parents[3]), path.parent)


def test_read_only_cache_is_still_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(store)
    cache.forget()
    monkeypatch.setattr(os, "access", lambda path, mode: store.root not in path.parents)
    with pytest.warns(RuntimeWarning, match="not writable"):
        assert cache.find(DIGEST) == path


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_full_disk_moves_to_the_private_folder(
    store: Store, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if str(store.root) in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(kind, os.strerror(kind))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.warns(RuntimeWarning, match=os.strerror(kind)):
        path = cache.writable(put)
    assert store.root not in path.parents and path.read_bytes() == b"code"
    assert not store.entry(DIGEST).exists()
    assert list((store.root / "tmp").iterdir()) == []
    cache.discard(Store(path.parents[3]), path.parent)


def test_cache_deleted_under_a_running_process(store: Store) -> None:
    put(store)
    cache.find(DIGEST)
    os.rename(store.root, store.root.with_name("gone"))
    assert cache.find(DIGEST) is None
    assert cache.writable(put) == store.entry(DIGEST) / "kernel.so"


def aged(store: Store, text: bytes, age_s: float, size: int = 1000) -> str:
    digest = cache_entry.sha256(text)
    folder = put(store, digest, b"x" * size).parent
    then = time.time() - age_s
    os.utime(folder, (then, then))
    return digest


def test_prune_removes_the_least_recently_used(store: Store) -> None:
    ages = ((b"1", 4000), (b"2", 3000), (b"3", 5000), (b"4", 1))
    _, old, kept, new = (aged(store, name, age) for name, age in ages)
    size = cache_upkeep.modules(store)[0].bytes
    freed = cache_upkeep.prune(store, 3 * size + size // 2, keep=frozenset((kept,)))
    left = {entry.digest for entry in cache_upkeep.modules(store)}
    assert freed == size and left == {old, kept, new}
    cache_upkeep.prune(store, 0, keep=frozenset((kept,)))
    assert {entry.digest for entry in cache_upkeep.modules(store)} == {kept, new}  # new is in use
    cache_upkeep.prune(store, 0, young_s=0.0)
    assert cache_upkeep.modules(store) == []


def test_use_protects_from_pruning(store: Store) -> None:
    first, second = aged(store, b"1", 4000), aged(store, b"2", 3000)
    assert cache.find(first) is not None
    cache_upkeep.prune(store, cache_upkeep.modules(store)[0].bytes)
    assert [entry.digest for entry in cache_upkeep.modules(store)] == [first]
    assert cache.find(second) is None


def test_texts_count_and_are_pruned(store: Store) -> None:
    cache.text_put("traced", DIGEST, "x" * 1000)
    assert cache_upkeep.total_bytes(store) > 1000
    assert cache_upkeep.prune(store, 0, young_s=0.0) > 1000
    assert cache.text_get("traced", DIGEST) is None


def test_clear_and_verify(store: Store) -> None:
    put(store)
    truncate(put(store, OTHER).parent)
    cache.text_put("traced", DIGEST, "abc")
    assert cache_upkeep.exists(store)
    (broken,) = cache_upkeep.verify_all(store)
    assert broken.digest == OTHER and "bytes, its manifest says" in str(broken.problem)
    assert cache_upkeep.verify_all(store, repair=True) == [broken]
    assert cache_upkeep.verify_all(store) == []
    assert cache_upkeep.clear(store) > 0
    assert cache_upkeep.total_bytes(store) == 0
    assert cache.text_get("traced", DIGEST) is None


def test_clean_removes_what_killed_processes_left(store: Store) -> None:
    program = (
        "import os, sys, time\nfrom attnengine.cache import Store\nfrom pathlib import Path\n"
        "store = Store(Path(sys.argv[1]))\n"
        "with store.stage() as stage:\n"
        "    (stage / 'half.so').write_bytes(b'x')\n"
        "    print(stage, flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(store.root)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    child.stdout.close()
    (store.root / "locks" / DIGEST).touch()
    with store.stage() as ours:
        cache_upkeep.clean(store)
        assert left.exists() and ours.exists()  # both alive
        child.kill()
        child.wait()
        cache_upkeep.clean(store)
        assert not left.exists() and ours.exists()
    assert list((store.root / "locks").iterdir()) == []


HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom attnengine.cache_lock import hold\n"
    "with hold(Path(sys.argv[1]), 'x', 10) as got:\n"
    "    print(got, flush=True)\n    time.sleep(60)\n"
)


def test_a_killed_holder_frees_the_lock(store: Store) -> None:
    path = store.root / "locks" / DIGEST
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    holder.stdout.close()
    assert cache_lock.try_lock(path) is None
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with cache_lock.hold(path, "x", 5) as got:
        assert got


def test_a_waiter_names_the_holder_and_gives_up(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_lock, "_PATIENCE_S", 0.05)
    path = store.root / "locks" / DIGEST
    with cache_lock.hold(path, "first", 1) as got:
        assert got
        with cache_lock.hold(path, "second", 0.2) as second:
            assert not second
    assert f"second: waiting for pid {os.getpid()} on " in caplog.text
    assert "building without it" in caplog.text
    with cache_lock.hold(path, "third", 0) as third:
        assert third


def test_a_forked_child_does_not_keep_the_lock(store: Store) -> None:
    path = store.root / "locks" / DIGEST
    out, into = os.pipe()
    with cache_lock.hold(path, "x", 1) as got:
        assert got
        child = os.fork()
        if child == 0:
            os.close(into)
            os.read(out, 1)  # lives on until the parent closes its end
            os._exit(0)
    os.close(out)
    with cache_lock.hold(path, "x", 0) as again:
        assert again
    os.close(into)
    os.waitpid(child, 0)


def test_a_lock_removed_while_waiting_is_not_held_twice(store: Store) -> None:
    path = store.root / "locks" / DIGEST
    with cache_lock.hold(path, "x", 1):
        path.unlink()
        with cache_lock.hold(path, "y", 0) as second:
            assert second  # another file: the loser's rename decides
            assert cache_lock.try_lock(path) is None


@pytest.mark.parametrize(
    "name, value, call",
    [
        ("ATTNENGINE_CACHE_LIMIT_MB", "much", settings.cache_limit_bytes),
        ("ATTNENGINE_CACHE_LIMIT_MB", "-1", settings.cache_limit_bytes),
        ("ATTNENGINE_CACHE_LIMIT_MB", "nan", settings.cache_limit_bytes),
        ("ATTNENGINE_BUILD_TIMEOUT_S", "inf", settings.build_timeout_s),
        ("ATTNENGINE_DISABLE_JIT", "maybe", settings.jit_disabled),
        ("ATTNENGINE_ISA", "sse9", settings.isa_override),
    ],
)
def test_bad_settings_name_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, call
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}='{value}': expected"):
        call()


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ATTNENGINE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings.cache_dir() == tmp_path / "attnengine"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative is ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings.cache_dir() == tmp_path / ".cache" / "attnengine"


def test_entry_checks_are_errors_of_the_cache(store: Store) -> None:
    folder = put(store).parent
    truncate(folder)
    with pytest.raises(CacheError, match="has 2 bytes, its manifest says 4"):
        cache_entry.verify(folder)
