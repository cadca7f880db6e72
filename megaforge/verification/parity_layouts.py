"""The layouts that must train the same model as one rank: each axis on its own, and together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaforge.errors import UserError


@dataclass(frozen=True)
class ParityLayout:
    """One row of the matrix.

    Attributes:
        name: how it is called in tables and in ``--layouts``.
        ranks: how many it takes.
        flags: what a training run is given to be laid out like this; dp is what the other sizes leave of the ranks.
    """

    name: str
    ranks: int
    flags: tuple[str, ...]


def _layout(name: str, ranks: int, flags: str = "") -> ParityLayout:
    return ParityLayout(name, ranks, tuple(flags.split()))


LAYOUTS: tuple[ParityLayout, ...] = (
    # One axis.
    _layout("micro1", 1, "--micro-batch-size 1"),
    _layout("tp2", 2, "--tp 2"),
    _layout("tp4-sp", 4, "--tp 4 --sp"),
    _layout("cp2", 2, "--cp 2"),
    _layout("cp4", 4, "--cp 4"),
    _layout("cp4-ring", 4, "--cp 4 --cp-comm-type p2p"),
    _layout("dp2", 2, "--micro-batch-size 2"),
    _layout("dp8", 8, "--micro-batch-size 1"),
    _layout("pp2-gpipe", 2, "--pp 2 --micro-batch-size 2 --pipeline-schedule gpipe"),
    _layout("pp2-1f1b", 2, "--pp 2 --micro-batch-size 2 --pipeline-schedule 1f1b"),
    _layout("pp2-vpp2", 2, "--pp 2 --vpp 2 --micro-batch-size 2"),
    _layout("pp2-zb-h1", 2, "--pp 2 --micro-batch-size 2 --pipeline-schedule zb-h1"),
    _layout("pp2-zb-v", 2, "--pp 2 --micro-batch-size 2 --pipeline-schedule zb-v"),
    _layout("pp4-vpp2", 4, "--pp 4 --vpp 2 --micro-batch-size 2"),
    _layout("pp8", 8, "--pp 8 --micro-batch-size 2"),
    _layout("ep2", 2, "--ep 2"),
    _layout("ep4", 4, "--ep 4 --micro-batch-size 2"),
    _layout("etp2", 2, "--etp 2"),
    _layout("dp2-zero1", 2, "--zero 1 --micro-batch-size 2"),
    _layout("dp2-zero2", 2, "--zero 2 --micro-batch-size 2"),
    # Several.
    _layout("tp2-etp1", 2, "--tp 2 --etp 1"),
    _layout("tp2-sp-recompute", 2, "--tp 2 --sp --recompute full --sequence-checkpoint 16"),
    _layout("ep2-etp2", 4, "--ep 2 --etp 2 --micro-batch-size 2"),
    _layout("tp2-dp2-ep4", 4, "--tp 2 --ep 4 --etp 1"),
    _layout("tp2-sp-dp2-zero2", 4, "--tp 2 --sp --zero 2 --micro-batch-size 2"),
    _layout("tp2-cp2-ep2", 4, "--tp 2 --cp 2 --ep 2"),
    _layout("ep2-dp4-zero1", 4, "--ep 2 --zero 1 --recompute moe --micro-batch-size 1 --sequence-checkpoint 16"),
    _layout("pp2-cp2-zb-v", 4, "--pp 2 --cp 2 --pipeline-schedule zb-v --recompute selective"),
    _layout("pp2-ep2-vpp2-zero1", 4, "--pp 2 --vpp 2 --ep 2 --zero 1 --micro-batch-size 1"),
    _layout("tp2-pp2-dp2", 8, "--tp 2 --pp 2 --micro-batch-size 2"),
    _layout("tp2-sp-cp2-dp2-ep4-zero2", 8, "--tp 2 --sp --cp 2 --ep 4 --etp 1 --zero 2 --micro-batch-size 2"),
    _layout("tp2-sp-pp2-cp2-vpp2", 8, "--tp 2 --sp --pp 2 --cp 2 --vpp 2"),
    _layout("pp2-dp2-zero2", 4, "--pp 2 --zero 2 --micro-batch-size 2 --ddp-bucket-size 5000"),
    _layout(
        "pp2-ep2-zero2-zb-h1",
        4,
        "--pp 2 --ep 2 --zero 2 --pipeline-schedule zb-h1 --recompute full --micro-batch-size 2",
    ),
    _layout("tp2-pp2-ep4-zero1-zb-h1", 8, "--tp 2 --pp 2 --ep 4 --etp 1 --zero 1 --pipeline-schedule zb-h1"),
    _layout("tp2-pp2-vpp2-zero2", 8, "--tp 2 --pp 2 --vpp 2 --zero 2 --micro-batch-size 2"),
    _layout("tp4-sp-dp2-ep4-etp2", 8, "--tp 4 --sp --ep 4 --etp 2"),
    _layout("pp4-vpp2-dp2-ep2", 8, "--pp 4 --vpp 2 --ep 2 --micro-batch-size 1"),
)


def choose_layouts(names: Sequence[str]) -> list[ParityLayout]:
    """The rows called ``names``, in their order; all without any.

    Raises:
        UserError: no row has this name.
    """
    known = {layout.name: layout for layout in LAYOUTS}
    for name in names:
        if name not in known:
            raise UserError(f"--layouts {name}: no layout has this name; choose from {', '.join(known)}")
    return [known[name] for name in names] if names else list(LAYOUTS)
