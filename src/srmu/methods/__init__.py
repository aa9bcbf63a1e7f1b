"""The methods: an explicit table, `METHODS`, from name to class."""

from srmu.methods.adaptive_rmu import AdaptiveRMU
from srmu.methods.base import Edit, Method, Objective
from srmu.methods.ga import GA
from srmu.methods.graddiff import GradDiff
from srmu.methods.misdirection import Misdirection
from srmu.methods.npo import NPO
from srmu.methods.rmu import RMU
from srmu.methods.srmu import SRMU

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (SRMU, RMU, AdaptiveRMU, GA, GradDiff, NPO)
}

__all__ = ["METHODS", "RMU", "SRMU", "AdaptiveRMU", "Edit", "Method", "Misdirection", "Objective"]
