"""The Prometheus endpoint of a run, fetched over HTTP while the run goes on."""

from __future__ import annotations

import json
import re
import socket
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaforge.errors import UserError
from megaforge.monitor.names import EVALUATION, STEP
from megaforge.monitor.prometheus import OWN, PrometheusSink, metric_name, unit
from megaforge.training.callbacks import Callback
from tests.end_to_end.launch import REPO
from tests.training.tiny import arguments, make_config, make_trainer, write_dataset

pytest.importorskip("prometheus_client")

GRAFANA = REPO / "docs" / "grafana" / "megaforge.json"


@pytest.fixture
def port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=300) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[tuple[str, str], float]:
    """The numbers of an answer by (name, labels besides the run's), as the package's own parser reads them."""
    parser = pytest.importorskip("prometheus_client.parser")
    return {
        (one.name, ",".join(f'{name}="{value}"' for name, value in one.labels.items() if name != "run")): one.value
        for family in parser.text_string_to_metric_families(text)
        for one in family.samples
    }


def serve(port: int, alerts: Callable[[], dict[str, bool]] = dict) -> PrometheusSink:
    return PrometheusSink(port, "127.0.0.1", "mine", {"version": "1"}, 10, alerts)


def test_the_newest_numbers_are_served(port: int) -> None:
    sink = serve(port, lambda: {"nan": True, "disk": False})
    assert ("megaforge_iteration", "") in samples(fetch(port)), "before the first step, too"
    sink.write("step", 1, {"loss": 3.0, "memory_share": 0.25, "grad_norm": 1.0})
    sink.write("step", 2, {"loss": float("nan"), "grad_norm": 2.0, "grad_norm/moe": 1.5, "my-own number": 7})
    sink.write("evaluation", 2, {"loss": 2.5})
    sink.write("test", 2, {"loss": 2.25})
    text = fetch(port)
    found = samples(text)
    sink.close()
    loss = found.pop(("megaforge_train_loss", ""))
    assert loss != loss, "nan is a number to Prometheus"
    assert found.pop(("megaforge_last_step_timestamp_seconds", "")) > 1.7e9
    assert {key: value for key, value in found.items() if key[0].startswith("megaforge")} == {
        ("megaforge_run_info", 'version="1"'): 1,
        ("megaforge_iteration", ""): 2,
        ("megaforge_train_iters", ""): 10,
        ("megaforge_alert_firing", 'alert="nan"'): 1,
        ("megaforge_alert_firing", 'alert="disk"'): 0,
        ("megaforge_train_memory_share", ""): 0.25,
        ("megaforge_train_grad_norm", ""): 2,
        ("megaforge_train_grad_norm_by_part", 'part="moe"'): 1.5,
        ("megaforge_train_my_own_number", ""): 7,
        ("megaforge_valid_loss", ""): 2.5,
        ("megaforge_test_loss", ""): 2.25,
    }
    assert 'run="mine"' in text and "process_resident_memory_bytes" in text
    with pytest.raises(OSError):
        fetch(port)


def test_a_port_in_use_and_an_address_without_meaning(port: int) -> None:
    sink = serve(port)
    with pytest.raises(UserError, match=rf"--prometheus-port {port}: it cannot be listened on .*another port"):
        serve(port)
    sink.close()
    serve(port).close()
    with pytest.raises(UserError, match="--prometheus-address http://x: expected an address"):
        make_config([*arguments("d"), "--prometheus-port", "9400", "--prometheus-address", "http://x"])
    with pytest.raises(UserError, match="--prometheus-address no.such.address.invalid"):
        PrometheusSink(port, "no.such.address.invalid", "mine", {}, 1)


def test_a_missing_package_names_its_extra(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UserError, match=r"--prometheus-port needs .* 'megaforge\[prometheus\]'"):
        serve(port)


def test_a_run_is_fetched_while_it_trains(tmp_path: Path, port: int) -> None:
    prefix = write_dataset(tmp_path / "data")
    flags = ("--prometheus-port", str(port), "--run-name", "mine", "--eval-iters", "1", "--eval-interval", "1")
    trainer = make_trainer(arguments(prefix, *flags, "--train-iters", "3"))
    fetched: list[dict[tuple[str, str], float]] = []

    class Fetching(Callback):
        def on_step_end(self, trainer: Any, metrics: Any) -> None:
            fetched.append(samples(fetch(port)))

    trainer.add(Fetching())
    trainer.train()
    assert [found["megaforge_iteration", ""] for found in fetched] == [1, 2, 3]
    last = fetched[-1]
    assert last["megaforge_train_tokens", ""] == 3 * 8 * 24 and last["megaforge_valid_perplexity", ""] > 1
    assert last["megaforge_alert_firing", 'alert="nan"'] == 0 and ("megaforge_train_mfu", "") in last
    [info] = [labels for name, labels in last if name == "megaforge_run_info"]
    assert 'config="custom"' in info and 'world="1"' in info
    with pytest.raises(OSError):
        fetch(port)


def test_units_say_what_names_say() -> None:
    names = ("step_seconds", "peak_memory_bytes", "tokens_per_second", "expert_entropy_bits")
    assert list(map(unit, names)) == ["seconds", "bytes", "tokens per second", "bits"]
    assert (unit("loss"), unit("mtp_loss/1"), unit("mfu")) == ("nats", "nats", "1")


def test_the_dashboard_shows_what_there_is() -> None:
    """Every name in its queries is one that a run serves, and every panel has a title, a query and a place."""
    board = json.loads(GRAFANA.read_text())
    known = OWN.keys() | {metric_name("step", name)[0] for name in STEP}
    known |= {metric_name(kind, name)[0] for kind in ("evaluation", "test") for name in EVALUATION}
    known |= {"process_resident_memory_bytes", "process_cpu_seconds_total"}
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len(panels) >= 12 and len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"\b(?:megaforge|process)_\w+", query)}
    assert used <= known, used - known
    assert {"megaforge_train_loss", "megaforge_alert_firing", "megaforge_train_tokens_per_second"} <= used
    for panel in panels:
        assert panel["title"] and panel["targets"] and panel["datasource"]["uid"] == "${datasource}"
        place = panel["gridPos"]
        assert 0 <= place["x"] and place["x"] + place["w"] <= 24
    assert [one["name"] for one in board["templating"]["list"]] == ["datasource", "run"]
