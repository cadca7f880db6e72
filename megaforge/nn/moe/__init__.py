"""Mixture of experts."""

from megaforge.nn.moe.layer import MoEFFN
from megaforge.nn.moe.router import Router, RouterLosses, update_routers

__all__ = ["MoEFFN", "Router", "RouterLosses", "update_routers"]
