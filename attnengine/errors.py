"""The exceptions of attnengine, and a check that operators share. Each message names the argument,
its value, the limit and the next step; each class is also the built-in exception that callers would
expect in its place."""

import torch


class AttnEngineError(Exception):
    """Base of every error that attnengine raises by itself."""


class TraceError(AttnEngineError, ValueError):
    """A user's function cannot be turned into a kernel: names the op and the line that used it."""


class RowFunctionError(AttnEngineError, ValueError):
    """A row function breaks one of the rules that tiling and differentiation rely on."""


class BuildError(AttnEngineError, RuntimeError):
    """The compiler, or the check of what it made, failed: shows the command and the log."""


class KernelUnavailable(AttnEngineError, RuntimeError):
    """A kernel is in no cache and cannot be compiled here: lists where it was looked for, and the
    command that makes it elsewhere (``problem`` and ``remedy``)."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem}\n{self.remedy}" if self.remedy else self.problem


class CacheError(AttnEngineError, RuntimeError):
    """A cache entry is missing a part, altered, or not to be trusted."""


def require_dense(name: str, x: torch.Tensor, tokens: str) -> None:
    """Raises ValueError for a nested or sparse tensor; ``tokens`` names the dimension of tokens."""
    if x.is_nested:
        raise ValueError(
            f"{name}: a nested tensor, expected a dense one; lay the sequences one after the other "
            f"along {tokens} and pass cu_seqlens"
        )
    if x.layout is not torch.strided:
        raise ValueError(f"{name}: layout {x.layout}, expected torch.strided; use .to_dense()")
