"""attnengine: attention written in plain PyTorch, run as a fused kernel."""

from typing import Any

from .errors import (
    AttnEngineError,
    BuildError,
    CacheError,
    KernelUnavailable,
    RowFunctionError,
    TraceError,
)

_broken: Exception | None = None
try:
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
    from .kvcache import attention_with_kvcache
    from .linear import variants as linear_variants
    from .linear.api import linear_attention, linear_attention_step
    from .linear.spec import LinearAttentionSpec
    from .merge import merge_state, merge_states
    from .reference import reference
    from .rows import Identity, ReLU, Retention, Sigmoid, Softmax, SoftmaxSink
    from .spec import AttentionSpec, OnlineFunc
    from .statistics_reference import token_statistics_reference
    from .token_statistics import (
        TokenStatisticsState,
        token_statistics_attention,
        token_statistics_attention_step,
    )
    from .varlen import attention_varlen
except (ImportError, OSError) as error:  # torch, or the operator library: doctor must still run
    _broken = error

__version__ = "0.1.0"

__all__ = [
    "AttentionSpec", "AttnEngineError", "AuxOutput", "AuxRequest", "BuildError", "CacheError",
    "Handle", "Identity", "KernelUnavailable", "LinearAttentionSpec", "OnlineFunc", "ReLU",
    "Retention", "RowFunctionError", "Sigmoid", "Softmax", "SoftmaxSink", "Statistics",
    "TokenStatisticsState", "TraceError", "attention", "attention_varlen", "attention_with_kvcache",
    "compile", "explain", "flex_attention", "linear_attention", "linear_attention_step",
    "linear_variants", "merge_state", "merge_states", "reference", "token_statistics_attention",
    "token_statistics_attention_step", "token_statistics_reference", "variants",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if _broken is not None and name in __all__:
        raise ImportError(
            f"attnengine.{name}: {_broken} (the command `attnengine doctor` says what is missing)"
        ) from _broken
    raise AttributeError(f"module 'attnengine' has no attribute {name!r}")
