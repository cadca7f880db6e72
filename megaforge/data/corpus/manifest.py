"""``corpus.json``: what a finished corpus is, and the digest that names it. Training keeps the digest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megaforge.data.corpus.datasets import dataset_prefix
from megaforge.data.corpus.job import Job
from megaforge.data.corpus.totals import Total
from megaforge.data.corpus.work import temporary, write_json
from megaforge.data.sidecar import digest_of
from megaforge.durable import give_name
from megaforge.errors import UserError
from megaforge.json_text import parse_json


def manifest_path(output: Path) -> Path:
    """Where it lies."""
    return output / "corpus.json"


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The description of the corpus in ``output``; None where there is none.

    Raises:
        UserError: the file is damaged, or describes something else.
    """
    try:
        content = parse_json(manifest_path(output).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{manifest_path(output)}: cannot be read ({error})") from error
    if not isinstance(content, dict) or content.get("format") != "megaforge-corpus":
        raise UserError(f"{manifest_path(output)}: not the description of a corpus")
    return content


def describe(job: Job, total: Total) -> dict[str, Any]:
    """The manifest of a corpus whose datasets are made. Its digest covers what was read, the recipe, and the content of
    every dataset."""
    plan = parse_json((job.work.path / "plan.json").read_bytes())
    datasets = [_dataset(job, name, counts) for name, counts in total.datasets.items()]
    manifest = {
        "format": plan["format"],
        "version": plan["version"],
        "recipe": plan["recipe"],
        "on_error": plan["on_error"],
        "read": total.read,
        "stages": [{"name": name, **counts} for name, counts in total.stages.items()],
        "datasets": datasets,
        "documents": sum(dataset["documents"] for dataset in datasets),
        "bytes": sum(dataset["bytes"] for dataset in datasets),
        "tokens": sum(dataset.get("tokens", 0) for dataset in datasets),
    }
    return {**manifest, "digest": digest_of(manifest), "plan": plan["plan"]}


def publish_manifest(job: Job, manifest: dict[str, Any]) -> None:
    """Names the corpus in each dataset's own description, and says last that the corpus is whole."""
    for dataset in manifest["datasets"]:
        if "prefix" in dataset:
            _name_corpus(job, dataset, manifest["digest"])
    write_json(manifest_path(job.output), manifest)


def _dataset(job: Job, name: str, counts: dict[str, Any]) -> dict[str, Any]:
    """What curricula choose a dataset by, and what tells its content."""
    shard = job.recipe.shard
    source, domain, length, *quality = name.split("-")
    described = {
        "name": name,
        "source": source,
        "domain": domain,
        "characters": _range(shard.length_buckets, length),
        "quality_bucket": _range(shard.quality_buckets, quality[0]) if quality else None,
        "quality": counts["quality_millionths"] / 1e6 / counts["scored"] if counts["scored"] else None,
        "date": _median(counts["months"]),
        **{key: counts[key] for key in ("documents", "bytes", "languages")},
    }
    prefix = dataset_prefix(job.output, name)
    try:
        sidecar = parse_json(Path(f"{prefix}.json").read_bytes())
    except FileNotFoundError:
        return described
    return {
        **described,
        "prefix": os.path.relpath(prefix, job.output),
        "tokens": sidecar["tokens"],
        "bin_sha256": sidecar["bin_sha256"],
        "idx_sha256": sidecar["idx_sha256"],
    }


def _median(months: dict[str, int]) -> str | None:
    """The first day of the month in which the middle one of the dated documents lies."""
    before, total = 0, sum(months.values())
    for month in sorted(months):
        before += months[month]
        if 2 * before >= total:
            return f"{month}-01"
    return None


def _range(edges: tuple[Any, ...], bucket: str) -> list[Any]:
    """[least, below] of a bucket; null where it is open."""
    number = int(bucket[1:])
    return [edges[number - 1] if number else None, edges[number] if number < len(edges) else None]


def _name_corpus(job: Job, dataset: dict[str, Any], digest: str) -> None:
    """Adds to a dataset's description the corpus it belongs to; its sources are named from the output on."""
    path = Path(f"{job.output / dataset['prefix']}.json")
    sidecar = parse_json(path.read_bytes())
    chosen_by = ("source", "domain", "characters", "quality", "date")
    known = {name: dataset[name] for name in chosen_by if dataset[name] is not None}
    sidecar["corpus"] = {"digest": digest, **known}
    for source in sidecar["sources"]:
        source["path"] = os.path.relpath(source["path"], job.output)
    partial = temporary(path)
    partial.write_text(json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    give_name(partial, path)
