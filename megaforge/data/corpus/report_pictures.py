"""The pictures of the report: what each stage kept, why documents were dropped, lengths, and what the corpus is of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaforge.data.corpus.report_data import ATTRIBUTES, LENGTHS, ReportData
from megaforge.data.images import save_image
from megaforge.errors import UserError, require

_KEPT, _DROPPED = "#2a6f97", "#c9ada7"
_MOST = 15  # bars of one picture


def draw_pictures(folder: Path, stages: dict[str, dict[str, Any]], data: ReportData) -> list[tuple[str, str]]:
    """Writes the pictures; returns (title, file) of each, or nothing where matplotlib is not installed."""
    try:
        figure = require("matplotlib.figure", extra="train", purpose="drawing the report's pictures").Figure
    except UserError:
        return []
    folder.mkdir(exist_ok=True)
    drawn = []
    for name, title, draw in (
        ("stages", "Text that each stage passed on", lambda axes: _stages(axes, stages)),
        ("reasons", "Why documents were dropped", lambda axes: _reasons(axes, data)),
        ("lengths", "Characters of a document", lambda axes: _lengths(axes, data)),
        *(
            (attribute, f"Kept and dropped documents by {attribute}", _by_attribute(attribute, data))
            for attribute in ATTRIBUTES
            if len(data.read[attribute]) > 1
        ),
        ("clusters", "Sizes of groups of like documents", lambda axes: _clusters(axes, data)),
    ):
        if name == "clusters" and not data.clusters:
            continue
        picture = figure(figsize=(7.5, 3.6), layout="constrained")
        axes = picture.subplots()
        axes.set_title(title, loc="left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        draw(axes)
        save_image(picture, folder / f"{name}.png", "report")
        drawn.append((title, f"{folder.name}/{name}.png"))
    return drawn


def _legend(axes: Any) -> None:
    """Above the picture, where no bar is."""
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _stages(axes: Any, stages: dict[str, dict[str, Any]]) -> None:
    names = list(stages)
    axes.barh(names, [stages[name]["bytes"] / 1e6 for name in names], color=_DROPPED, label="came in")
    axes.barh(names, [stages[name]["kept_bytes"] / 1e6 for name in names], color=_KEPT, label="passed on")
    axes.invert_yaxis()
    axes.set_xlabel("MB of text")
    _legend(axes)


def _reasons(axes: Any, data: ReportData) -> None:
    most = data.dropped.most_common(_MOST)
    axes.barh([f"{stage}: {reason}" for (stage, reason), _ in most], [number for _, number in most], color=_DROPPED)
    axes.invert_yaxis()
    axes.set_xlabel("documents")


def _lengths(axes: Any, data: ReportData) -> None:
    edges = [LENGTHS[0] / 1.8, *LENGTHS, LENGTHS[-1] * 1.8]
    for row, colour, label in ((1, _DROPPED, "dropped"), (0, _KEPT, "kept")):
        axes.stairs(data.lengths[row], edges, fill=True, color=colour, alpha=0.8, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("characters")
    axes.set_ylabel("documents")
    _legend(axes)


def _by_attribute(name: str, data: ReportData) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        most = [value for value, _ in data.read[name].most_common(_MOST)]
        kept = [data.kept[name][value] for value in most]
        gone = [data.read[name][value] - stays for value, stays in zip(most, kept, strict=True)]
        axes.barh(most, kept, color=_KEPT, label="kept")
        axes.barh(most, gone, left=kept, color=_DROPPED, label="dropped")
        axes.invert_yaxis()
        axes.set_xlabel("documents")
        _legend(axes)

    return draw


def _clusters(axes: Any, data: ReportData) -> None:
    sizes = sorted(data.clusters.values(), reverse=True)
    axes.plot(range(1, len(sizes) + 1), [size + 1 for size in sizes], color=_KEPT, drawstyle="steps-post")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("groups, the largest first")
    axes.set_ylabel("documents")
