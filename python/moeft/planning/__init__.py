"""Forecast of memory and speed before anything is loaded."""

from moeft.planning.forecast import plan
from moeft.planning.report import Plan, PlanRow
from moeft.planning.settings import Settings

__all__ = ["Plan", "PlanRow", "Settings", "plan"]
