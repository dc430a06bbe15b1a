"""Large final states come from memory that is used again: csrc/pool.h, as tensors see it. What it
keeps and frees is in tests/cpp/host_test.cpp."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnengine as ae
from attnengine import memory

pytestmark = pytest.mark.compiles
D, DV = 40, 24  # of the modules of test_linear_call.py
B, H = 512, 4
BYTES = B * H * D * DV * 4  # 7.9 MB
LIMIT = 256 << 20
SPEC = ae.LinearAttentionSpec()


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    gc.collect()
    memory.keep_at_most(0)
    memory.keep_at_most(LIMIT)
    yield
    memory.keep_at_most(LIMIT)


def token(seed: int = 0, batch: int = B) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, 2, 1, D, generator=g) for _ in range(2))
    v = torch.randn(batch, H, 1, DV, generator=g)
    return {"q": q, "k": k, "v": v, "decay": F.logsigmoid(torch.randn(batch, H, 1, generator=g))}


def step(x: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    return ae.linear_attention_step(spec=SPEC, state=state, **x)


def want(x: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    given: Any = {"initial_state": state} if state is not None else {}
    return ae.reference(
        x["q"], x["k"], x["v"], SPEC, decay=x["decay"], output_final_state=True, **given
    )


def near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=2e-5, atol=2e-5)


def test_steps_write_two_blocks_in_turns() -> None:
    state, addresses = None, []
    for t in range(6):
        _, state = step(token(t), state)
        addresses.append(state.data_ptr())
    assert len(set(addresses)) == 2 and addresses[::2] == addresses[:1] * 3
    assert all(address % 4096 == 0 for address in addresses)
    assert BYTES <= memory.kept() < BYTES + (4 << 20)  # the one before


def test_a_state_that_is_alive_is_left_alone() -> None:
    x, y = token(1), token(2)
    _, first = step(x, None)
    kept = first.clone()
    others = [step(y, first)[1] for _ in range(3)]
    assert len({t.data_ptr() for t in (first, *others)}) == 4
    assert torch.equal(first, kept)
    for other in others:
        near(other, want(y, first)[1])


def test_a_view_keeps_the_block() -> None:
    x = token(3)
    _, state = step(x, None)
    address, view, before = state.data_ptr(), state[1:], state[1:].clone()
    del state
    _, again = step(token(4), None)
    assert again.data_ptr() != address and torch.equal(view, before)


def test_results_in_used_memory_are_right() -> None:
    _, old = step(token(5), None)
    address = old.fill_(torch.nan).data_ptr()
    del old
    x = token(6)
    out, state = step(x, None)
    assert state.data_ptr() == address
    wanted = want(x, None)
    near(out, wanted[0])
    near(state, wanted[1])


def test_autograd_keeps_what_it_needs() -> None:
    x = token(7)
    leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
    _, state = step(leaves, None)
    out, state = step(token(8), state)  # the state between is saved for backward
    step(token(9), None)  # and its memory not used
    (out.sum() + state.sum()).backward()
    golden = {n: t.clone().requires_grad_() for n, t in x.items()}
    _, between = want(golden, None)
    out, state = want(token(8), between)
    (out.sum() + state.sum()).backward()
    for n, t in leaves.items():
        if n == "q":  # of the step before: only its state was used
            continue
        torch.testing.assert_close(t.grad, golden[n].grad, rtol=1e-3, atol=1e-3)


def test_no_more_is_kept_than_allowed() -> None:
    memory.keep_at_most(2 * BYTES + (8 << 20))
    states = [step(token(0), None)[1] for _ in range(4)]
    newest = {t.data_ptr() for t in states[2:]}
    while states:
        del states[0]
    assert BYTES < memory.kept() <= 2 * BYTES + (8 << 20)
    assert {step(token(0), None)[1].data_ptr() for _ in range(2)} <= newest
    memory.keep_at_most(0)
    assert memory.kept() == 0
    step(token(0), None)
    assert memory.kept() == 0
    with pytest.raises(ValueError, match="at least 0"):
        memory.keep_at_most(-1)


def test_small_states_are_torch_s_own() -> None:
    _, state = step(token(0, batch=2), None)
    assert state.untyped_storage().resizable()
    del state
    assert memory.kept() == 0


def test_such_tensors_are_tensors() -> None:
    _, state = step(token(10), None)
    before = state.clone()
    assert before.data_ptr() != state.data_ptr()
    assert torch.equal(copy.deepcopy(state), before)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.equal(torch.load(file), before)
    assert torch.equal(torch.from_numpy(state.numpy()), before)
    assert state.view(-1)[5] == before.view(-1)[5]
    with pytest.raises(RuntimeError, match="not resizable"):
        state.resize_(2 * B, H, D, DV)
    assert torch.equal(state.resize_(1, H, D, DV), before[:1])  # not larger
    _, state = step(token(10), None)
    free = memory.kept()
    assert torch.equal(state.share_memory_(), before) and state.is_shared()
    assert memory.kept() >= free + BYTES  # it was copied


def test_threads() -> None:
    """Loops of several threads, whose states die in other threads too."""
    wanted = [want(token(i), None)[1] for i in range(2)]
    errors: list[str] = []
    passed: list[Tensor] = []

    def loop(i: int) -> None:
        for _ in range(10):
            _, state = step(token(i), None)
            passed.append(state)
            if not torch.allclose(state, wanted[i], rtol=2e-5, atol=2e-5):
                errors.append(f"thread {i}")
            if len(passed) > 3:
                passed.pop(0)

    step(token(0), None)
    threads = [threading.Thread(target=loop, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    passed.clear()
    assert 0 < memory.kept() <= LIMIT


def test_a_tensor_may_outlive_everything() -> None:
    """States that die after the interpreter's modules, and after static objects."""
    script = f"""
import builtins, ctypes, torch, attnengine as ae
q = torch.randn({B}, 2, 1, {D}); v = torch.randn({B}, {H}, 1, {DV})
decay = torch.zeros({B}, {H}, 1)
_, state = ae.linear_attention_step(q, q, v, None, None, decay=decay)
builtins.kept = state
leaked = state.view(-1)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(leaked))
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
