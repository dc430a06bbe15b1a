"""Benchmarks, run from a checkout: `python -m bench cpu`.

Folder order is the order of a run: cases (what is timed and the bar), baselines (peers, checked for
equal output before they are timed), peaks (what the machine can do), runner (interleaved timing),
calls and startup (dispatch cost, compile latency), report (table, JSON, Markdown).
"""
