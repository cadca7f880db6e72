"""Kinds of layers: what is known of them before they are built, and that nobody else asks for one by its name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megaforge.config.check_layout import check_layout
from megaforge.config.cli import parse_config
from megaforge.config.pattern import parse_pattern
from megaforge.errors import UserError
from megaforge.models.generation_state import chosen, side_by_side
from megaforge.models.hybrid import HybridModel
from megaforge.models.stages import build_model, make_stage_tensors, plan_pipeline
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.registry import LAYER_KINDS, load_extensions
from tests.nn.support import CTX, assert_close, filled

PACKAGE = Path(__file__).parents[2] / "megaforge"
TOY = str(PACKAGE.parent / "tests" / "toys" / "running_mean.py")
NAMES = {"R", "*", "E", "mamba2", "rwkv7", "rwkv", "attention", "moe", "dense"}  # not "-", which is also a minus
# Their own files; flags whose values are words like theirs (--layer-schedule, --ffn).
OWN = {"nn/kinds/attention.py", "nn/kinds/rwkv7.py", "nn/kinds/dense.py", "nn/kinds/experts.py", "config/pattern.py"}


def asked_for_by_name(source: str) -> Iterator[str]:
    """Comparisons with the name or letter of a kind, and what is looked up by such names unless it is text."""
    for node in ast.walk(ast.parse(source)):
        words: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            words = [node.left, *node.comparators]
            words += [item for word in words if isinstance(word, ast.Tuple | ast.Set | ast.List) for item in word.elts]
        if isinstance(node, ast.Dict) and not all(isinstance(value, ast.Constant) for value in node.values):
            words = list(node.keys)
        if isinstance(node, ast.MatchValue):
            words = [node.value]
        named = {word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)}
        if named & NAMES and "schedule" not in ast.unparse(node):
            yield f"line {node.lineno}: {ast.unparse(node)[:80]}"


def test_nobody_asks_for_a_kind_by_its_name() -> None:
    files = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    assert OWN < files.keys()
    found = [f"{name} {what}" for name in files.keys() - OWN for what in asked_for_by_name(files[name].read_text())]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "if block.mixer == 'rwkv7': pass",
        "x = 1 if 'E' in kinds else 2",
        "while kind not in ('moe', 'none'): pass",
        "layer = {'dense': A, 'moe': B}[kind]",
        "match kind:\n    case 'attention': pass",
    ],
)
def test_each_way_of_asking_is_seen(code: str) -> None:
    assert len(list(asked_for_by_name(code))) == 1


def test_what_is_checked_needs_no_torch() -> None:
    code = (
        "import sys\nfrom megaforge.config.check_layout import check_layout\n"
        "from megaforge.config.cli import parse_config\n"
        "config = parse_config(['--hybrid-layer-pattern', 'RE*-', '--vocab-size', '64']).config\n"
        "check_layout(config, 2)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=300)


def test_a_users_letter_is_known_and_checked() -> None:
    load_extensions((TOY,))
    toy = LAYER_KINDS.get("G")
    blocks = parse_pattern("G-*EG|R-".replace("R", "G"))
    assert [block.mixer is toy for block in blocks] == [True, False, True, True]
    assert [block.first for block in blocks] == [True, True, False, False]
    with pytest.raises(UserError, match=r"unknown letter 'x'.*G \(running mean\)"):
        parse_pattern("G-x")
    line = ["--hybrid-layer-pattern", "G-*E", "--vocab-size", "64", "--seq-length", "64"]
    with pytest.raises(UserError, match="--cp 2: the model has a running mean, which cannot be split; use --cp 1"):
        check_layout(parse_config([*line, "--cp", "2"]).config, 2)
    with pytest.raises(UserError, match="--tp 5 does not divide --.*; use --tp 1"):
        check_layout(parse_config([*line, "--tp", "5"]).config, 5)


def test_carried_tensors_travel_from_the_first_stage_with_such_a_layer_to_the_last() -> None:
    load_extensions((TOY,))
    flags = ["--config", "cdrmix-test", "--vocab-size", "64", "--pp", "4", "--global-batch-size", "8"]
    config = parse_config([*flags, "--hybrid-layer-pattern", "R-|*-G-|R-G-|*-"]).config
    plan = plan_pipeline(config.model, config.parallel, 8, 64)
    ctx = ParallelContext.of_rank(2, 8, tp=2, pp=4, device="meta")
    model = build_model(make_layer_context(config.model, ctx), plan)
    tensors = make_stage_tensors(model, plan, 3, 64, torch.bfloat16)
    width = config.model.hidden_size
    assert tensors["x"].shape == (64, 3, width) and not tensors["x"].carried
    made = {name: (t.shape, t.made_by, t.read_until) for name, t in tensors.items() if t.carried}
    assert made == {"v_first": ((64, 3, width // 2), 0, 2), "mean_gate": ((64, 3, width // 2), 1, 2)}


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,) * 9, (4, 1, 4), (9,)])
def test_a_users_layer_remembers_what_it_has_read(cuts: tuple[int, ...]) -> None:
    load_extensions((TOY,))
    cfg = parse_config(
        ["--config", "cdrmix-test", "--vocab-size", "64", "--hybrid-layer-pattern", "G-*-G-"]
    ).config.model
    model = filled(HybridModel(make_layer_context(cfg, CTX, dtype=torch.float64)))
    tokens = torch.arange(18).view(2, 9)
    states, outs = [model.new_state() for _ in range(2)], []
    for row, state in enumerate(states):  # each alone, then side by side
        model.logits(tokens[row : row + 1, :3], state=state)
    state = chosen(side_by_side(states), torch.tensor([1, 0]))
    outs = [model.logits(piece, state=state) for piece in tokens[[1, 0]].split(cuts, dim=1)]
    whole = model.logits(torch.cat([tokens[:, :3], tokens], dim=1))[[1, 0], 3:]
    assert_close(torch.cat(outs, dim=1), whole, 1e-12, "logits")
