"""A mixer as a user would add it: letter T, running sums of a projection, the first layer's given to the later ones."""

from torch import nn

from megaforge.config.layer_kind import LayerKind
from megaforge.nn.sublayer import NOTHING, LayerOutput
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megaforge.registry import LAYER_KINDS


class Toy(LayerKind):
    """Carries a tensor from its first layer to the later ones."""

    title = "toy mixer"

    def build(self, layer):
        return ToyMixer(layer)

    def flops(self, cfg, sequence_length):
        return 2.0 * cfg.hidden_size

    def carried(self, cfg, length, batch, tp):
        return {"memory": (length, batch, cfg.hidden_size // tp)}


class ToyMixer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        width, declared = layer.cfg.hidden_size, {"init": Normal(0.02), "kind": "other"}
        self.inward = ColumnParallelLinear(layer, width, width, enter=True, **declared)
        self.outward = RowParallelLinear(layer, width, width, **declared)

    def forward(self, x, info, carried=NOTHING, state=None):
        mixed = self.inward(x).cumsum(0).tanh()
        if "memory" in carried:
            return LayerOutput(self.outward(mixed * carried["memory"]))
        return LayerOutput(self.outward(mixed), {"memory": mixed})

    def new_state(self):
        return None


LAYER_KINDS.register("T", Toy())
