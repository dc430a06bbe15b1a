"""Benchmarks, run from a checkout: `python -m bench cpu --report`.

In the order of a run: variants and cases (what is timed, and the bar), baselines (peers), agreement
(nothing is timed before it is right), peaks (what the machine can do), runner (interleaved rounds),
session (what was asked for and found); the groups of rows: attention, siblings, decode, serving,
linear, token_statistics, memory, calls, startup; then rows, record, plots, speed, report (verdicts,
JSON, pictures, README, a page). docs/benchmarks.md says how each number is made. schedule is a
model, not a measurement.

On a GPU: `python -m bench.gpu --out DIR`, in the modules gpu_*. They do without attnengine where it
cannot be built. cases (what is timed), peers, agreement, clock, timing, suite (the numerics suite),
machine; worker and crew (processes that a broken kernel may end), deadline, report.
"""
