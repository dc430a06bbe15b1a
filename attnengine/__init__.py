"""attnengine: attention written in plain PyTorch, run as a fused kernel."""

from . import variants
from .api import (
    AuxOutput,
    AuxRequest,
    Handle,
    Statistics,
    attention,
    compile,
    explain,
    flex_attention,
)
from .errors import (
    AttnEngineError,
    BuildError,
    CacheError,
    KernelUnavailable,
    RowFunctionError,
    TraceError,
)
from .reference import reference
from .rows import Identity, ReLU, Retention, Sigmoid, Softmax, SoftmaxSink
from .spec import AttentionSpec, OnlineFunc

__version__ = "0.1.0"

__all__ = [
    "AttentionSpec", "AttnEngineError", "AuxOutput", "AuxRequest", "BuildError", "CacheError",
    "Handle", "Identity", "KernelUnavailable", "OnlineFunc", "ReLU", "Retention",
    "RowFunctionError", "Sigmoid", "Softmax", "SoftmaxSink", "Statistics", "TraceError",
    "attention", "compile", "explain", "flex_attention", "reference", "variants",
]  # fmt: skip
