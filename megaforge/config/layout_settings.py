"""Which settings make a layout, and which of them the user has fixed."""

from __future__ import annotations

from collections.abc import Mapping

# The settings that a choice sets, where the user has not.
CHOSEN = (
    "parallel.tensor_model_parallel_size",
    "parallel.sequence_parallel",
    "parallel.context_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.num_layers_per_virtual_pipeline_stage",
    "parallel.pipeline_schedule",
    "parallel.expert_model_parallel_size",
    "parallel.expert_tensor_parallel_size",
    "parallel.zero_stage",
    "parallel.recompute",
    "training.micro_batch_size",
)


def given_settings(origins: Mapping[str, str]) -> frozenset[str]:
    """Of :data:`CHOSEN`, what the user wrote, on the command line or in a file of their own: a choice keeps it.

    Args:
        origins: of every setting (:class:`megaforge.config.cli.ParsedConfig`).
    """
    return frozenset(key for key in CHOSEN if not origins.get(key, "default").startswith(("default", "preset ")))
