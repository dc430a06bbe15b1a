"""A machine without a compiler, for tests of prebuilt kernels, and what its errors say.

Modules are those of other tests (float32, D=40 x 24), so none is new.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnengine as ae

D, DV = 40, 24

USER = """
import torch
import attnengine as ae

slope = torch.tensor([0.1, -0.2, 0.3, 0.4], requires_grad=True)
spec = ae.AttentionSpec(
    score_mod=lambda s, b, h, q, k: s + slope[h] * (q - k),
    mask_mod=lambda b, h, q, k: q + 2 >= k,
)
gate = torch.full((4, 1, 1), 0.3, requires_grad=True)
gated = ae.LinearAttentionSpec(out_mod=lambda x: x * torch.sigmoid(gate))
"""

CALL = """
import sys
sys.path.insert(0, {here!r})
import torch, attnengine as ae
from user_variant import gate, gated, slope, spec as user

def call(spec, d, dv, extra=()):
    g = torch.Generator().manual_seed(1)
    sizes = ((2, 4, 33, d), (2, 2, 47, d), (2, 2, 47, dv))
    q, k, v = (torch.randn(s, generator=g).requires_grad_() for s in sizes)
    out = ae.attention(q, k, v, spec)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v, *extra))]

def linear(spec, extra=()):
    g = torch.Generator().manual_seed(1)
    sizes = ((2, 2, 33, {D}), (2, 2, 33, {D}), (2, 4, 33, {DV}))
    x = [torch.randn(s, generator=g).requires_grad_() for s in sizes]
    decay = (-torch.rand(2, 4, 33, generator=g)).requires_grad_()
    out = ae.linear_attention(*x, spec, decay=decay)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (*x, decay, *extra))]

def statistics():
    g = torch.Generator().manual_seed(1)
    w, temp = torch.randn(2, 3, 70, {D}, generator=g).requires_grad_(), torch.ones(3)
    y = ae.token_statistics_attention(w, temp, True)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), w)]

CALLS = {{
    "causal": lambda: call(ae.variants.causal(), {D}, {DV}),
    "full": lambda: call(ae.AttentionSpec(), {D}, {DV}),
    "user": lambda: call(user, 8, 8, (slope,)),
    "recurrence": lambda: linear(ae.LinearAttentionSpec()),
    "gated": lambda: linear(gated, (gate,)),
    "statistics": statistics,
}}
results = {{}}
for name in sys.argv[2:]:
    try:
        results[name] = CALLS[name]()
    except ae.KernelUnavailable as error:
        results[name] = str(error)
from attnengine import compiler
results["compiler"] = compiler.find_compiler()
torch.save(results, sys.argv[1])
"""


class Bare:
    """A machine without a compiler: new processes with an empty cache and a bare environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "user_variant.py").write_text(USER)
        (root / "call.py").write_text(CALL.format(here=str(root), D=D, DV=DV))

    def run(self, *names: str, **variables: str) -> dict:
        shutil.rmtree(self.root / "cache", ignore_errors=True)
        keep = {n: os.environ[n] for n in ("HOME", "LD_LIBRARY_PATH") if n in os.environ}
        here = str(Path(ae.__file__).parents[1])  # the package under test, installed or not
        variables["PYTHONPATH"] = os.pathsep.join([here, variables.get("PYTHONPATH", here)])
        out = self.root / "results.pt"
        done = subprocess.run(
            [sys.executable, str(self.root / "call.py"), str(out), *names],
            env={
                "PATH": "/nowhere",
                "ATTNENGINE_CACHE_DIR": str(self.root / "cache"),
                **keep,
                **variables,
            },
            cwd=self.root,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not list((self.root / "cache").rglob("kernel.so"))
        found = torch.load(out)
        assert "no C++ compiler" in found.pop("compiler")
        return {**found, "stderr": done.stderr}

    def here(self, name: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
        """The same call in this process, with its cache and compiler."""
        namespace: dict = {}
        monkeypatch.syspath_prepend(str(self.root))
        monkeypatch.setattr(sys, "argv", ["call.py", str(self.root / "here.pt")])
        exec((self.root / "call.py").read_text(), namespace)
        return namespace["CALLS"][name]()


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


def lines_in(text: str) -> list[str]:
    """The lines of Python that an error gives for a file of requests."""
    lines = [line.strip() for line in text.splitlines()]
    (start,) = (i for i, x in enumerate(lines) if x.startswith("from attnengine.prebuild import"))
    return lines[start:]


def command_in(text: str) -> tuple[list[str], str]:
    """The words of the prebuild command in an error, and what its --specs says."""
    (line,) = (line for line in text.splitlines() if "attnengine prebuild" in line)
    words = shlex.split(line)
    assert words[-2:] == ["--out", "DIR"]
    return words, words[words.index("--specs") + 1]
