"""What a letter of the layer pattern stands for. Needs no torch: the configuration is checked before torch is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megaforge.config.model_config import ModelConfig

if TYPE_CHECKING:
    from megaforge.config.config import Config


class LayerKind:
    """A kind of layer: what everybody else must know of it. A subclass overrides what differs; an instance is
    registered by its letter, in any file that ``--extensions`` names::

        LAYER_KINDS.register("T", Toy())

    Attributes:
        title: for people: ``RWKV-7 layer``.
        asked_by: the flags that put it into a model, besides its letter in the pattern.
        is_mixer: True for what mixes tokens and opens a block, False for an FFN, which joins the mixer in front of it.
        token_shift: of a mixer: the FFN behind it sees each token mixed with the one before it.
        has_experts: matrices of it are laid out over ep and etp, and it counts what it routes.
        recurrent: tokens hand a state on, of which ``--sequence-checkpoint`` keeps some.
        recompute: the value of ``--recompute`` that computes this layer alone again in the backward pass.
        axes: of tp and cp those over which it can be split.
        kernel: the field of :class:`megaforge.planning.gpus.Efficiency` that :meth:`flops` are counted at.
        settings: flags that shape it and nothing else (``model.rwkv_init``): without it in a model they do nothing.
        in_megatron: whether Megatron-LM has such a layer.
    """

    title = "layer"
    asked_by = ""
    is_mixer = True
    token_shift = False
    has_experts = False
    recurrent = False
    recompute = ""
    axes: tuple[str, ...] = ("tp", "cp")
    kernel = "matmul"
    settings: tuple[str, ...] = ()
    in_megatron = False

    def check(self, cfg: ModelConfig) -> None:
        """
        Raises:
            UserError: such a layer cannot be built with these numbers, on however many ranks.
        """

    def check_places(self, places: Sequence[int], flag: str) -> None:
        """
        Args:
            places: the blocks of the model that have such a layer.
            flag: the layer pattern, for the message.

        Raises:
            UserError: it cannot be there.
        """

    def split_over_tp(self, config: Config, world_size: int) -> list[tuple[str, int]]:
        """(How a message names it, size) of what has to divide by ``--tp``."""
        return []

    def experts(self, cfg: ModelConfig) -> tuple[str, int]:
        """(The flag, number) of the experts of a kind that has some; ``--ep`` divides it."""
        return "--num-experts", cfg.num_experts

    def expert_width(self, cfg: ModelConfig) -> tuple[str, int]:
        """(How a message names it, size) of the width of each expert, which ``--etp`` divides."""
        raise NotImplementedError

    def build(self, layer: Any) -> Any:
        """The layer, a :class:`megaforge.nn.sublayer.Sublayer`, from a
        :class:`megaforge.parallel.layer_context.LayerContext`."""
        raise NotImplementedError

    def flops(self, cfg: ModelConfig, sequence_length: int) -> float:
        """Forward FLOPs of one token besides the products with trained matrices, on all ranks together."""
        return 0.0

    def carried(self, cfg: ModelConfig, length: int, batch: int, tp: int) -> dict[str, tuple[int, ...]]:
        """Tensors that the first layer of this kind makes and later ones read, which pipeline stages hand on: name ->
        shape on a rank, for ``batch`` sequences of ``length`` tokens inside the tensor-parallel region."""
        return {}

    def describe(self, cfg: ModelConfig) -> str:
        """What shapes it besides what shapes every model, for the line that names a run's blocks; may be empty."""
        return ""

    def norms_embedding(self, cfg: ModelConfig) -> bool:
        """Whether a model with this layer norms its embedding."""
        return False

    def ends_init(self, cfg: ModelConfig) -> tuple[Any, Any] | None:
        """Initial rules of embedding and untied head in models with this layer; None: the usual ones."""
        return None
