"""A toy update rule, as a user would write one: it must see whole rows, or columns, of a matrix."""

from __future__ import annotations

from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim import UpdateRule
from megaforge.parallel.param_spec import ParamSpec
from megaforge.registry import UPDATE_RULES


class CentredDescent(UpdateRule):
    """Momentum less its mean along the dimension that tp does not split, scaled to a root mean square of one there.
    Vectors and embeddings are Adam's."""

    implementation = "centred descent"
    whole_parameters = True

    @classmethod
    def takes(cls, spec: ParamSpec) -> bool:
        return spec.update == "matrix"

    @classmethod
    def states(cls, config: OptimizerConfig) -> tuple[str, ...]:
        return ("momentum",)

    def step(self, lr: float, done: int) -> None:
        for main in self.parameters:
            momentum = main.in_shape(main.state["momentum"])
            momentum.lerp_(main.in_shape(main.grad), 0.5 if done else 1.0)
            along = -2 if main.spec.shard_dim == len(main.spec.shape) - 1 else -1
            update = momentum - momentum.mean(along, keepdim=True)
            update = update / update.square().mean(along, keepdim=True).sqrt().clamp_min(1e-12)
            main.in_shape(main.master.detach()).sub_(update, alpha=lr * main.spec.lr_mult)


UPDATE_RULES.register("centred", CentredDescent)
