"""Timelines of pipeline schedules, as text and as a picture."""

from __future__ import annotations

from pathlib import Path

from megaforge.data.images import save_image
from megaforge.errors import require
from megaforge.parallel.pipeline.actions import Action, ActionKind
from megaforge.parallel.pipeline.simulator import Timeline

# Later chunks of a rank are drawn paler.
COLOURS = {
    ActionKind.FORWARD: "#6b9bd1",
    ActionKind.BACKWARD: "#8fc27a",
    ActionKind.BACKWARD_INPUT: "#f0b45b",
    ActionKind.BACKWARD_WEIGHT: "#8fc27a",
}
LEGEND = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "backward, inputs",
    ActionKind.BACKWARD_WEIGHT: "backward, weights",
}


def draw_text(timeline: Timeline, columns: int | None = None) -> str:
    """One line per rank; a column is the shortest action's time, dots are bubbles.

    ``F3`` is the forward pass of microbatch 3 (B backward, I its input half, W its weight half); with several chunks
    per rank ``F1:3`` is that of chunk 1.

    Args:
        columns: cuts lines to this many characters; None leaves them whole.
    """
    shortest = min((span.end - span.start for rank in timeline.spans for span in rank), default=1.0) or 1.0
    width = 1 + max((len(_label(timeline, span.action)) for rank in timeline.spans for span in rank), default=1)
    lines = []
    for rank, spans in enumerate(timeline.spans):
        line = ""
        for span in spans:
            line = line.ljust(round(span.start / shortest) * width, ".")
            end = max(round(span.end / shortest) * width, len(line) + width)
            line += (_label(timeline, span.action) + "|").rjust(width).ljust(end - len(line), "-")
        line = f"rank {rank:>2} |" + line.ljust(round(timeline.makespan / shortest) * width, ".")
        lines.append(line if columns is None or len(line) <= columns else line[: columns - 1] + ">")
    return "\n".join(lines)


def _label(timeline: Timeline, action: Action) -> str:
    schedule = timeline.schedule
    chunk = f"{schedule.chunk_of(action.stage)}:" if schedule.num_chunks > 1 else ""
    return f"{action.kind}{chunk}{action.microbatch}"


def draw_image(timeline: Timeline, path: Path, flag: str = "--output") -> None:
    """Writes the timeline to ``path`` as the picture that its suffix names.

    Raises:
        UserError: matplotlib is missing, or ``path`` cannot be written; names ``flag``.
    """
    figures = require("matplotlib.figure", extra="train", purpose=f"drawing the timeline {path}")
    patches = require("matplotlib.patches", extra="train", purpose=f"drawing the timeline {path}")
    schedule = timeline.schedule
    actions = max(len(spans) for spans in timeline.spans)
    figure = figures.Figure(figsize=(min(3 + 0.3 * actions, 60), 1.6 + 0.45 * schedule.num_ranks), layout="constrained")
    axes = figure.add_subplot()
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            shade = 1.0 - 0.45 * schedule.chunk_of(span.action.stage) / max(schedule.num_chunks - 1, 1)
            bar = [(span.start, span.end - span.start)]
            axes.broken_barh(
                bar,
                (rank - 0.42, 0.84),
                facecolor=COLOURS[span.action.kind],
                alpha=shade,
                edgecolor="white",
                linewidth=0.5,
            )
            if actions <= 200:
                middle = (span.start + span.end) / 2
                axes.text(middle, rank, str(span.action.microbatch), ha="center", va="center", fontsize=7)
    used = {span.action.kind for spans in timeline.spans for span in spans}
    handles = [patches.Patch(color=COLOURS[kind], label=text) for kind, text in LEGEND.items() if kind in used]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(handles), frameon=False)
    axes.set_yticks(range(schedule.num_ranks), [f"rank {rank}" for rank in range(schedule.num_ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.makespan)
    peak = max(timeline.peak_live(rank) for rank in range(schedule.num_ranks)) / schedule.num_chunks
    title = (
        f"{schedule.name}: pp {schedule.num_ranks}, vpp {schedule.num_chunks}",
        f"{schedule.num_microbatches} microbatches",
        f"bubble {100 * timeline.bubble_share():.1f}%, peak {peak:g} live microbatches",
        "bars show their microbatch, paler for later chunks",
    )
    axes.set_title("; ".join(title), fontsize=9)
    figure.set_dpi(110)
    save_image(figure, path, flag)
