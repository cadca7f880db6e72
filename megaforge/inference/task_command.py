"""``tools/evaluate.py --tasks``: what a model answers, as a table, JSON, and a picture by length."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megaforge.config.arguments import integer
from megaforge.data.images import check_image, save_image
from megaforge.data.outputs import make_parents, temporary_path
from megaforge.durable import replacing
from megaforge.errors import UserError, require
from megaforge.inference.tool_calls import ToolCalls, ToolSetting, add_tool_flags, check_tool_flags
from megaforge.tasks.lm_eval_file import check_task, is_lm_evals
from megaforge.tasks.task_file import read_task

if TYPE_CHECKING:
    from megaforge.inference.restore import TrainedModel
    from megaforge.inference.task_run import Result

_ONLY_TASKS = ("lengths", "examples", "max_length", "cache", "plot", "log_samples")


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that go with ``--tasks``."""
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--lengths", nargs="+", type=integer(1), metavar="TOKENS", help="of examples (default: as in training)"
    )
    group.add_argument("--examples", type=integer(1), metavar="N", help="of each task and length (default: 50)")
    group.add_argument(
        "--max-length",
        type=integer(2),
        metavar="TOKENS",
        help="of a prompt and its answer (default: what --lengths need, at least as in training)",
    )
    group.add_argument("--cache", metavar="FILE", help="keep answers, and go on from those that it has")
    group.add_argument("--plot", metavar="FILE", help="picture of metrics by length: .png, .svg or .pdf")
    group.add_argument("--log-samples", metavar="FILE", help="write each prompt, its answers and the model's (JSONL)")
    add_tool_flags(parser)


def check_task_flags(flags: argparse.Namespace) -> None:
    """
    Raises:
        UserError: a flag that goes with ``--tasks`` alone stands beside ``--input``, or the other way round; or a task
            or file is bad.
    """
    check_tool_flags(flags)
    if flags.tools and not flags.tasks:
        raise UserError(f"--tools {' '.join(flags.tools)}: it goes with --tasks, not with --input; leave it out")
    names = ("part", "json_key", "seq_length", "baseline", "train_data") if flags.tasks else _ONLY_TASKS
    for name in names:
        if (value := getattr(flags, name)) is not None:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            here, there = ("--tasks", "--input") if flags.tasks else ("--input", "--tasks")
            raise UserError(f"--{name.replace('_', '-')} {shown}: it goes with {there}, not with {here}; leave it out")
    if flags.plot:
        check_image(flags.plot, "--plot")
    for task in flags.tasks or ():
        (check_task if is_lm_evals(task) else read_task)(task)


def evaluate_tasks(flags: argparse.Namespace, trained: TrainedModel) -> None:
    """Answers ``--tasks`` and reports. Collective."""
    from megaforge.inference.answer_cache import AnswerCache, identity
    from megaforge.inference.asked import Asked, tasks_answered
    from megaforge.parallel.agree import from_first_rank

    tokenizer = trained.load_tokenizer(flags.tokenizer_model)
    tools = None
    if flags.tools:
        tools = ToolCalls.of(flags.tools, ToolSetting(trained.model, trained.config, tokenizer, flags.memory))
    asked = Asked(flags.tasks, flags.lengths or (), flags.examples, flags.max_length, flags.batch_size, tools)
    room = asked.room(trained)
    cache: list[AnswerCache] = []

    def open_cache() -> None:
        if flags.cache:
            how = (room, flags.ema, flags.adapter, flags.dtype, flags.use_custom_kernels, tokenizer.fingerprint)
            memory = () if flags.memory is None else (identity(flags.memory),)
            cache.append(AnswerCache(flags.cache, identity(trained.path, *how, *flags.tools, *memory)))

    from_first_rank(trained.ctx, open_cache)
    try:
        found = tasks_answered(asked, trained, tokenizer, cache[0] if cache else None)
    finally:
        for one in cache:
            one.close()
    if found is not None:
        _report(flags, trained, *found)


def _report(
    flags: argparse.Namespace, trained: TrainedModel, results: list[Result], samples: list[dict[str, Any]]
) -> None:
    if flags.log_samples:
        write_lines(samples, flags.log_samples)
    if flags.plot:
        draw(results, flags.plot)
    if flags.json:
        facts = {"checkpoint": str(trained.path), "iteration": trained.meta.get("iteration"), "ema": flags.ema}
        print(json.dumps(facts | {"results": [vars(result) for result in results]}))
        return
    print(f"{trained.path}{' (average of the weights)' if flags.ema else ''}")
    print("\n".join(table(results)))


def write_lines(samples: Sequence[dict[str, Any]], path: str) -> None:
    """Writes ``--log-samples``.

    Raises:
        UserError: it cannot be written.
    """
    make_parents(path, "--log-samples")
    try:
        with replacing(path, temporary_path(path)) as part:
            part.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples), "utf-8")
    except OSError as error:
        raise UserError(f"--log-samples {path}: cannot be written ({error.strerror})") from error


def table(results: Sequence[Result]) -> list[str]:
    """One line a result."""
    width = max([len("task"), *(len(result.task) for result in results)])
    lines = [f"{'task':<{width}} {'length':>7} {'examples':>8}  {'metric':<20} {'value':>9}  95 % interval"]
    for one in results:
        length = "" if one.length is None else f"{one.length:,}"
        says = "" if one.higher_is_better is not None else "  (described, not judged)"
        span = f"{one.low:.4f} to {one.high:.4f}"
        lines.append(
            f"{one.task:<{width}} {length:>7} {one.examples:>8}  {one.metric:<20} {one.value:>9.4f}  {span}{says}"
        )
    return lines


def draw(results: Sequence[Result], path: str) -> None:
    """Metrics that are better when higher, by length.

    Raises:
        UserError: matplotlib is missing, there is nothing to draw, or the file cannot be written.
    """
    matplotlib = require("matplotlib", extra="train", purpose="--plot")
    matplotlib.use("Agg")
    plot = require("matplotlib.pyplot", extra="train", purpose="--plot")
    lines: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.length is not None and result.higher_is_better:
            lines[f"{result.task} ({result.metric})"].append(result)
    if not lines:
        raise UserError(f"--plot {path}: no task here has a length to draw by; leave it out")
    figure, axes = plot.subplots(figsize=(7, 4))
    for name, points in lines.items():
        points = sorted(points, key=lambda point: point.length or 0)
        errors = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
        axes.errorbar([p.length for p in points], [p.value for p in points], errors, marker="o", capsize=3, label=name)
    axes.set(xlabel="tokens", ylabel="value, with its 95 % interval", ylim=(-0.02, 1.02), xscale="log")
    axes.legend()
    figure.tight_layout()
    save_image(figure, path, "--plot")
    plot.close(figure)
