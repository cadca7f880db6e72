"""Several models at once. The names of source 002's interface are imported from here."""

from megaforge.fleet.creator import CognateCreator, TrainingConfig, create_cognate_models
from megaforge.fleet.progress import ProgressAggregator, TrainingPhase
from megaforge.fleet.resources import ResourceManager, SystemResources, get_optimal_workers

__all__ = [
    "CognateCreator",
    "ProgressAggregator",
    "ResourceManager",
    "SystemResources",
    "TrainingConfig",
    "TrainingPhase",
    "create_cognate_models",
    "get_optimal_workers",
]
