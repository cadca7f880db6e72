"""``tools/plan.py data``: what a run will read when, as a table and as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megaforge.config.arguments import ArgumentParser
from megaforge.config.batch_schedule import BatchSchedule, in_samples
from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.config.data_schedule import SourceFacts
from megaforge.data.curriculum import Source, plan_sources
from megaforge.data.data_source import source_kind
from megaforge.data.images import check_image, save_image
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.data.sample_schedule import Plan, SampleSchedule, Stage
from megaforge.errors import UserError, require
from megaforge.planning.table import table

_IMAGINED = 1 << 40  # tokens of a domain whose data are not there


@dataclass(frozen=True)
class Reading:
    """What is read: ``plan`` of the sources ``names``, up to sample ``stop``; ``epoch`` has the tokens of each source,
    nothing where the sources are imagined; ``streams`` the number of streams of each."""

    plan: Plan
    names: tuple[str, ...]
    streams: tuple[int, ...]
    epoch: tuple[int, ...]
    stop: int

    @property
    def stages(self) -> list[tuple[Stage, int]]:
        """The stages that are entered, each with the sample where it ends."""
        stops = [*self.plan.starts[1:], self.stop]
        pairs = zip(self.plan.stages, stops, strict=True)
        return [(stage, min(stop, self.stop)) for stage, stop in pairs if stage.start < self.stop]

    def read(self, stage: Stage, stop: int) -> list[int]:
        """Tokens of each source that have been read before sample ``stop`` of ``stage``."""
        cursors, found, first = stage.cursors_after(stop - stage.start), [], 0
        for count in self.streams:
            found.append(sum(cursors[first : first + count]))
            first += count
        return found


def parse_data(arguments: Sequence[str], prog: str) -> tuple[Config, argparse.Namespace]:
    """The command's own flag, and the run's.

    Raises:
        UserError: an unknown flag or value, or nothing to show.
    """
    parser = ArgumentParser(prog=prog, add_help=False)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to draw it: .png, .svg or .pdf")
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
    own, rest = parser.parse_known_args(arguments)
    if own.output is not None:
        check_image(own.output)
    config = parse_config(rest, prog=prog).config
    if not config.data.data_path and config.data.data_schedule is None:
        raise UserError(f"{prog}: there is nothing to show: give --data-schedule, --data-path or both")
    if config.data.data_path:
        source_kind(config.data).check(config)
    return config, own


def run(arguments: Sequence[str], prog: str = "plan.py data") -> int:
    """The command."""
    config, own = parse_data(arguments, prog)
    found = reading(config)
    print(describe(found, config.data.data_schedule))
    if own.output is not None:
        draw(found, own.output)
        print(f"\nwrote {own.output}")
    return 0


def reading(config: Config) -> Reading:
    """What the run of ``config`` reads; without ``--data-path``, of imagined data of each domain.

    Raises:
        UserError: as opening the data, or the run reads more than there is.
    """
    schedule, stop = SampleSchedule.of(config), _samples(config)
    if config.data.data_path:
        config, tokenizer, _ = with_run_tokenizer(config)
        data: Any = source_kind(config.data).open(config, tokenizer)
        plan = getattr(data, "plan", None)
        if plan is None:
            raise UserError(f"--data-path {' '.join(config.data.data_path)}: this source follows no schedule")
        for notice in data.notices:
            print(notice)
        names, streams, epoch = data.source_names, data.source_streams, tuple(data.epoch_tokens)
    else:
        assert schedule.curriculum is not None
        domains = dict.fromkeys(domain for stretch in schedule.curriculum.stretches for domain in stretch.domains)
        names, streams, epoch = tuple(domains), (1,) * len(domains), ()
        sources = [Source(domain, _IMAGINED, SourceFacts(domain)) for domain in domains]
        if not sources:
            raise UserError(f"--data-schedule {schedule.curriculum.name} weighs no domains: give --data-path")
        weights, shares = [1.0] * len(sources), [[1.0]] * len(sources)
        schedule = replace(schedule, curriculum=replace(schedule.curriculum, max_epochs=None))
        plan, _ = plan_sources(schedule, sources, weights, shares, weighted=False)
    if plan.end is not None and plan.end < stop:
        print(f"after {plan.end:,} of {stop:,} samples everything has been read as often as max_epochs allows")
        stop = plan.end
    return Reading(plan, names, streams, epoch, stop)


def _samples(config: Config) -> int:
    """Samples of the run, as far as its flags tell without a layout: its global batch by default is a micro-batch."""
    training = config.training
    if config.length.train_samples is not None:
        return config.length.train_samples
    if config.length.train_tokens is not None:
        return max(1, config.length.train_tokens // config.data.seq_length)
    size = training.full_batch_size or training.micro_batch_size
    steps = in_samples(training.batch_steps, config.data.seq_length)
    return BatchSchedule(size, training.rampup_batch_size, steps=steps).samples_after(training.train_iters)


def describe(found: Reading, name: str | None) -> str:
    """A row for each stage: shares of the sources, and how often each has been read when it ends."""
    rows = [("from sample", "samples", "seq length", "tokens", *(short(one) for one in found.names))]
    for stage, stop in found.stages:
        shares = [f"{weight:.1%}" for weight in stage.weights]
        if found.epoch:
            read = found.read(stage, stop)
            epochs = (tokens / whole for tokens, whole in zip(read, found.epoch, strict=True))
            shares = [f"{share} (x{epoch:.2f})" for share, epoch in zip(shares, epochs, strict=True)]
        samples = stop - stage.start
        tokens = f"{samples * stage.sequence_length:,}"
        rows.append((f"{stage.start:,}", f"{samples:,}", f"{stage.sequence_length:,}", tokens, *shares))
    end = ": share of the tokens (passes over the source by then)" if found.epoch else ": share of the tokens"
    total = f"{found.plan.tokens_before(found.stop):,} tokens in {found.stop:,} samples"
    return f"{name or '--data-path'}{end}\n{table(rows)}\n{total}"


def short(prefix: str) -> str:
    """The last part of a dataset's prefix."""
    return prefix.rstrip("/").rpartition("/")[2]


def draw(found: Reading, path: Path) -> None:
    """The shares over the tokens read, and the sequence length above them.

    Raises:
        UserError: matplotlib is missing, or ``path`` cannot be written.
    """
    figures = require("matplotlib.figure", extra="train", purpose=f"drawing {path}")
    figure = figures.Figure(figsize=(9, 5), layout="constrained")
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    edges = [found.plan.tokens_before(stage.start) for stage, _ in found.stages]
    edges.append(found.plan.tokens_before(found.stop))
    weights = [stage.weights for stage, _ in found.stages]
    bottom = [0.0] * (len(weights) + 1)
    for source, name in enumerate(found.names):
        shares = [stage[source] for stage in weights]
        top = [low + share for low, share in zip(bottom, [*shares, shares[-1]], strict=True)]
        axes.fill_between(edges, bottom, top, step="post", label=short(name), linewidth=0)
        bottom = top
    lengths = [stage.sequence_length for stage, _ in found.stages]
    above.step(edges, [*lengths, lengths[-1]], where="post", color="black")
    above.set_ylim(bottom=0)
    above.set_ylabel("tokens a sample")
    axes.set_ylim(0, 1)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylabel("share of the tokens")
    axes.set_xlabel("tokens read")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.set_dpi(110)
    save_image(figure, path)
