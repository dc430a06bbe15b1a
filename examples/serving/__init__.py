"""Continuous batching over a paged KV cache, on the CPU: python -m examples.serving [--check]."""
