"""The strategies to contract a matrix parameter: one file each, registered when it is imported here."""

from . import gram, instantiate, project
from .registry import STRATEGIES, Problem, Strategy, choose_strategy, register_strategy

__all__ = ["STRATEGIES", "Problem", "Strategy", "choose_strategy", "register_strategy"]
