"""The methods: an explicit table, `METHODS`, from name to class."""

from srmu.methods.base import Edit, Method, Objective
from srmu.methods.depn import DEPN
from srmu.methods.edits import SSD, RepSelect, TaskArithmetic, WeightWalk
from srmu.methods.logits import GA, LLMU, NPO, RKLU, SCRUB, UNDIAL, GradDiff, SimNPO
from srmu.methods.misdirection import Misdirection
from srmu.methods.quark import Quark
from srmu.methods.rename_scrub import RenameScrub
from srmu.methods.retrain import Retrain
from srmu.methods.rmu import RMU, RMULAT, RNA, AdaptiveRMU
from srmu.methods.srmu import SRMU
from srmu.methods.suppressing import TAR, Iterated, MultiSite, Undo
from srmu.methods.whp import WHP

OF_ACTIVATIONS = (SRMU, RMU, AdaptiveRMU, RNA, RMULAT, MultiSite)
OF_LOGITS = (GA, GradDiff, NPO, SimNPO, UNDIAL, LLMU, SCRUB, RKLU, Quark, WHP)
OF_WEIGHTS = (SSD, DEPN, TaskArithmetic, RepSelect)
LASTING = (Undo, TAR, Iterated, RenameScrub, Retrain)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (*OF_ACTIVATIONS, *OF_LOGITS, *OF_WEIGHTS, *LASTING)}

__all__ = [
    "METHODS", "RMU", "SRMU", "AdaptiveRMU", "Edit", "Method", "Misdirection", "MultiSite",
    "Objective", "RenameScrub", "WeightWalk",
]  # fmt: skip
