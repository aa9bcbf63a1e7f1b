"""The methods: an explicit table, `METHODS`, from name to class."""

from srmu.methods.adaptive_rmu import AdaptiveRMU
from srmu.methods.base import Method, Misdirection, Objective
from srmu.methods.rmu import RMU
from srmu.methods.srmu import SRMU

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (SRMU, RMU, AdaptiveRMU)}

__all__ = ["METHODS", "RMU", "SRMU", "AdaptiveRMU", "Method", "Misdirection", "Objective"]
