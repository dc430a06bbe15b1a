"""The demo's picture: times of the variants, and the loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .gpt import Training
from .race import Result

# SDPA gets a dense mask where it can express the variant, else it runs plain causal attention.
LEGEND = {"SDPA": "SDPA (dense mask or plain causal)"}


def draw(path: Path, results: Sequence[Result], training: Training) -> None:
    """Write a PNG to `path`: forward and forward+backward bars beside the training curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    for axis, key, title in (
        (axes[0], "forward_ms", "forward"),
        (axes[1], "both_ms", "forward + backward"),
    ):
        for i, name in enumerate(("attnengine", "SDPA", "FlexAttention")):
            times = [getattr(result, key).get(name) for result in results]
            places = [row + (i - 1) * 0.27 for row, time in enumerate(times) if time is not None]
            if places:
                heights = [time for time in times if time is not None]
                bars = axis.bar(places, heights, 0.25, label=LEGEND.get(name, name), color=f"C{i}")
                axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.margins(y=0.2)  # room for the legend
        labels = [result.name.replace(", ", ",\n").replace(" (", "\n(") for result in results]
        axis.set_xticks(range(len(results)), labels, fontsize=8)
        axis.set_ylabel("ms, median")
        axis.set_title(f"{title}, {results[0].shape}")
        axis.legend(fontsize=8)
    axis = axes[2]
    axis.plot(training.losses, label="attnengine", linewidth=1)
    axis.plot(training.short_losses, label="attnengine, short context", linewidth=3, alpha=0.5)
    axis.plot(training.reference_losses, "k--", label="reference, short context", linewidth=1)
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per character")
    axis.set_title("character GPT, capped ALiBi with learned slopes, softmax plus one")
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
