"""What a host says of its links, against files and tools as machines have them."""

from __future__ import annotations

from pathlib import Path

from megaforge.planning.interconnect import device_links, fabric_ports, network_speeds

TOPOLOGY = """\tGPU0\tGPU1\tNIC0\tCPU Affinity
GPU0\t X \tNV18\tPIX\t0-31
GPU1\tNV18\t X \tSYS\t0-31
NIC0\tPIX\tSYS\t X \t

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def test_ports_that_are_up_tell_their_rate(tmp_path: Path) -> None:
    for port, state in (("mlx5_0/ports/1", "4: ACTIVE"), ("mlx5_1/ports/1", "1: DOWN")):
        (tmp_path / port).mkdir(parents=True)
        (tmp_path / port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (tmp_path / port / "state").write_text(state)
    assert fabric_ports(tmp_path) == {"mlx5_0/1": "400 Gb/sec (4X NDR)"}
    for name, speed in (("eth0", "100000"), ("eth1", "-1"), ("odd", "unknown")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "speed").write_text(speed)
    assert network_speeds(tmp_path) == {"eth0": 100e9}
    assert fabric_ports(tmp_path / "none") == {} == network_speeds(tmp_path / "none")


def test_the_drivers_tool_names_the_closest_link(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.write_text(TOPOLOGY)
    assert device_links([("no-such-tool",), ("cat", str(table))]) == "NV18"
    table.write_text(TOPOLOGY.replace("NV18", "PHB"))
    assert device_links([("cat", str(table))]) == "PIX", "as close as any"
    table.write_text("============ Link Type\n       GPU0  GPU1\nGPU0   0     XGMI\nGPU1   XGMI  0\n")
    assert device_links([("cat", str(table))]) == "XGMI"
    assert device_links([("false",)]) == ""
