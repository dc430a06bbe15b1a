"""The exceptions of attnengine. Each message names the argument, its value, the limit and the next
step; each class is also the built-in exception that callers would expect in its place."""


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
