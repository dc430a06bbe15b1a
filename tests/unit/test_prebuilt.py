"""Where prebuilt modules are looked for, and which are refused."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from build_work import needs_compiler, tiny

import attnengine as ae
from attnengine import build, prebuilt, staging


def packed(folder: Path, site: Path, name: str) -> Path:
    """A folder of modules under the namespace of kernel wheels in `site`, as pip would put it."""
    place = site / prebuilt.NAMESPACE / name
    shutil.copytree(folder, place)
    return place


def exported(out: Path, number: int = 7) -> Path:
    with build.collecting() as used:
        build.module(tiny(number), "portable", "x")
    build.export(used, out)
    build.forget()
    return out


@needs_compiler
@pytest.mark.compiles
def test_folders_come_before_wheels_and_wheels_before_the_cache(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(alone / "aot")
    wheels = [packed(folder, alone / "site", name) for name in ("b_kernels", "a_kernels")]
    (alone / "site" / prebuilt.NAMESPACE / "not_marked").mkdir()
    monkeypatch.syspath_prepend(str(alone / "site"))
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(folder))
    assert prebuilt.folders(staging.build_id()) == [folder, wheels[1], wheels[0]]
    assert prebuilt.NAMESPACE not in sys.modules
    for place in (folder, wheels[1], wheels[0], alone / "cache"):
        build.forget()
        path = build.module(tiny(), "portable", "x")
        assert place in path.parents
        shutil.rmtree(place)


@needs_compiler
@pytest.mark.compiles
def test_kernels_of_another_build_are_one_warning(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(alone / "aot")
    mark = folder / prebuilt.MARK
    known = json.loads(mark.read_text())
    assert known == {"build": staging.build_id(), "attnengine": ae.__version__}
    monkeypatch.setenv("ATTNENGINE_AOT_PATH", str(folder))
    for text in (json.dumps({**known, "build": "0" * 64}), "{", "[]"):
        mark.write_text(text)
        build.forget()
        with pytest.warns(RuntimeWarning, match=f"{folder} are not used: they are of build"):
            path = build.module(tiny(), "portable", "x")
        assert alone / "cache" in path.parents
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert alone / "cache" in build.module(tiny(8), "portable", "x").parents
    with build.collecting() as used:
        build.module(tiny(), "portable", "x")
    with pytest.raises(ae.CacheError, match="kernels of another build .* choose another folder"):
        build.export(used, folder)


def test_build_id_covers_what_every_module_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = staging.build_id()
    copy = tmp_path / "templates"
    shutil.copytree(staging.templates_dir(), copy)
    monkeypatch.setattr(staging, "templates_dir", lambda: copy)
    assert staging.build_id() == first
    with (copy / "common" / "abi.h").open("a") as file:
        file.write("// changed\n")
    assert staging.build_id() != first
