"""``tools/plan.py size``: widths for a number of parameters."""

from __future__ import annotations

import pytest

from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.planning.size_command import flags_of, nearest, run, sizes, widened


@pytest.mark.parametrize("active", [False, True])
def test_a_model_is_found_by_its_own_size(active: bool) -> None:
    """And its flags make it."""
    line = ["--config", "cdrmix-test", "--num-query-groups", "2", "--vocab-size", "96"]
    model = parse_config(line).config.model
    found = nearest(model, float(sizes(model)[active]), active=active)
    assert found[0] == model and len(found) == 3
    assert all(wide.head_dim == model.head_dim and wide.query_groups * 2 == wide.num_attention_heads for wide in found)
    written = parse_config([*line, *flags_of(found[1]).split()]).config.model
    assert written == found[1] and sizes(written) == sizes(found[1])


def test_all_widths_grow_together() -> None:
    model = parse_config(["--config", "cdrmix-core-1b"]).config.model
    wider = widened(model, 32)
    assert wider is not None and (wider.hidden_size, wider.ffn_hidden_size) == (4096, 9216)
    assert widened(parse_config(["--config", "cdrmix-test", "--num-query-groups", "2"]).config.model, 3) is None


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--config", "cdrmix-tiny", "--vocab-size", "2048", "--target", "8M", "--active"])
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert head == "cdrmix-tiny with 8,000,000 active parameters:" and names.split()[0] == "flags"
    assert [float(row.split()[-1].rstrip("%")) for row in rows] == sorted(
        (float(row.split()[-1].rstrip("%")) for row in rows), key=lambda share: max(share / 100, 100 / share)
    )


@pytest.mark.parametrize("target", ["4x", "0", "b", "-3", "nan"])
def test_what_is_no_number_is_refused(target: str) -> None:
    with pytest.raises(UserError, match=r"--target.* is not a number of parameters such as 4b"):
        run(["--config", "cdrmix-test", f"--target={target}"])


def test_nothing_near_is_said() -> None:
    with pytest.raises(UserError, match=r"--target 100: no width comes near it \(the narrowest has"):
        run(["--config", "cdrmix-test", "--vocab-size", "96", "--target", "100"])
