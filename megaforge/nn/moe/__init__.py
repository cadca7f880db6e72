"""Mixture of experts."""

from megaforge.nn.moe.layer import MoEFFN
from megaforge.nn.moe.router import Router, RouterLosses, expert_counts

__all__ = ["MoEFFN", "Router", "RouterLosses", "expert_counts"]
