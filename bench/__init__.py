"""Benchmarks, run from a checkout: `python -m bench cpu --report`.

In the order of a run: variants and cases (what is timed, and the bar), baselines (peers), agreement
(nothing is timed before it is right), peaks (what the machine can do), runner (interleaved rounds),
session (what was asked for and found); the groups of rows: attention, siblings, decode, memory,
calls, startup; then rows, record, plots, speed, report (verdicts, JSON, pictures, README, a page).
docs/benchmarks.md says how each number is made.
"""
