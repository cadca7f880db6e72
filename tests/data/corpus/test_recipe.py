"""corpus.yaml: what it says, and what is wrong with one that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.data.corpus.recipe import read_recipe
from megaforge.errors import UserError

GOOD = """
model_scale: 1b
sources:
  - {name: docs, files: [a, b/*.html], domain: web, licence: CC0}
stages:
  - exact
  - length: {minimum: 10, maximum: 1e4}
shard: {tokenizer_model: tok.json, length_buckets: [100, 200]}
""".replace("1e4", "10000")


def test_a_recipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "corpus.yaml"
    path.write_text(GOOD)
    recipe = read_recipe(path)
    assert recipe.run.model_scale == recipe.scope.model_scale == "1b"
    assert recipe.sources[0].files == ("a", "b/*.html") and recipe.sources[0].text_field == "text"
    assert [name for name, _ in recipe.stages] == ["exact", "length"]
    assert recipe.described()["stages"][1] == ["length", {"minimum": 10, "maximum": 10000}]
    assert recipe.shard.length_buckets == (100, 200) and recipe.scope.file("x") == tmp_path / "x"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("- exact", "- exakt", "corpus.yaml:6: stages: 'exakt' is not a known corpus stage .*did you mean exact"),
        ("minimum: 10", "minimun: 10", "corpus.yaml:7: stages.length: unknown key 'minimun'; did you mean minimum?"),
        ("minimum: 10", "minimum: -1", "corpus.yaml:7: stages.length.minimum: must be at least 0"),
        ("minimum: 10", "minimum: 20000", "corpus.yaml:7: stages.length: minimum 20000: must be at most maximum, 1000"),
        ("minimum: 10", "minimum: ten", "corpus.yaml:7: stages.length.minimum: expected an integer, got 'ten'"),
        ("model_scale: 1b", "model_scale: 2b", "corpus.yaml:2: corpus.model_scale: choose 1b, 4b, 40b or 200b"),
        ("model_scale: 1b", "model_scal: 1b", "corpus.yaml:2: unknown key 'model_scal'; did you mean model_scale?"),
        ("stages:", "stage:", "unknown key 'stage'; did you mean stages?"),
        ("name: docs", "name: ''", "name '': give one of letters"),
        ("files: [a, b/*.html], ", "", "docs: files is missing"),
        ("domain: web", "split: dev", "docs: subset and split are of a data set; name it with hub"),
        ("domain: web", "domian: web", "unknown key 'domian'; did you mean domain?"),
        ("[100, 200]", "[200, 100]", r"length_buckets \[200, 100\]: give ascending numbers"),
        ("tokenizer_model: tok.json, ", "", "tokenizer_model is missing"),
        ("shard: {tokenizer_model: tok.json, length_buckets: [100, 200]}", "", "'shard' is missing"),
        ("  - exact", "  - exact: {}\n    length: {}", "a stage is '- NAME'"),
        ("sources:\n", "sources: []\n#", "'sources' is missing"),
        ("model_scale: 1b", "a: [", "this is not YAML"),
        ("stages:\n", "stages: 3\n#", "must be a list|this is not YAML"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError, match=words):
        read_recipe(path, "corpus.yaml")


def test_names_are_unique_and_files_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "corpus.yaml"
    path.write_text(GOOD.replace("stages:", "  - {name: docs, files: [c]}\nstages:"))
    with pytest.raises(UserError, match="corpus.yaml:5: sources: two are called 'docs'"):
        read_recipe(path, "corpus.yaml")
    with pytest.raises(UserError, match="--config .*none.yaml: cannot read it: No such file"):
        read_recipe(tmp_path / "none.yaml")


def test_an_extension_brings_a_stage(tmp_path: Path) -> None:
    (tmp_path / "shout.py").write_text(
        "from dataclasses import dataclass\n"
        "from megaforge.data.corpus.stage import Outcome, RowStage, StageSettings\n"
        "from megaforge.registry import CORPUS_STAGES\n\n\n"
        "@dataclass(frozen=True)\n"
        "class ShoutSettings(StageSettings):\n"
        "    def open(self, scope):\n"
        "        return RowStage()\n\n\n"
        "CORPUS_STAGES.register('shout', ShoutSettings)\n"
    )
    path = tmp_path / "corpus.yaml"
    path.write_text(GOOD.replace("- exact", "- shout").replace("model_scale", "extensions: [shout.py]\nmodel_scale"))
    assert read_recipe(path).stages[0][0] == "shout"
