"""The methods: an explicit table, `METHODS`, from name to class."""

from srmu.methods.adaptive_rmu import AdaptiveRMU
from srmu.methods.altpo import AltPO
from srmu.methods.base import Edit, Method, Objective
from srmu.methods.ceu import CEU
from srmu.methods.depn import DEPN
from srmu.methods.edits import WeightWalk
from srmu.methods.flat import FLAT
from srmu.methods.ga import GA
from srmu.methods.graddiff import GradDiff
from srmu.methods.iterated import Iterated
from srmu.methods.llmu import LLMU
from srmu.methods.misdirection import Misdirection
from srmu.methods.multi_site import MultiSite
from srmu.methods.npo import NPO
from srmu.methods.pdu import PDU
from srmu.methods.quark import Quark
from srmu.methods.refusal import Refusal
from srmu.methods.rename_scrub import RenameScrub
from srmu.methods.repselect import RepSelect
from srmu.methods.retrain import Retrain
from srmu.methods.rklu import RKLU
from srmu.methods.rmu import RMU
from srmu.methods.rmu_lat import RMULAT
from srmu.methods.rna import RNA
from srmu.methods.satimp import SatImp
from srmu.methods.scrub import SCRUB
from srmu.methods.simnpo import SimNPO
from srmu.methods.srmu import SRMU
from srmu.methods.ssd import SSD
from srmu.methods.tar import TAR
from srmu.methods.task_arithmetic import TaskArithmetic
from srmu.methods.undial import UNDIAL
from srmu.methods.undo import Undo
from srmu.methods.wga import WGA
from srmu.methods.whp import WHP

OF_ACTIVATIONS = (SRMU, RMU, AdaptiveRMU, RNA, RMULAT, MultiSite)
OF_LOGITS = (
    GA,
    GradDiff,
    NPO,
    SimNPO,
    UNDIAL,
    LLMU,
    SCRUB,
    RKLU,
    Quark,
    WHP,
    WGA,
    SatImp,
    CEU,
    Refusal,
    AltPO,
    FLAT,
    PDU,
)
OF_WEIGHTS = (SSD, DEPN, TaskArithmetic, RepSelect)
LASTING = (Undo, TAR, Iterated, RenameScrub, Retrain)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (*OF_ACTIVATIONS, *OF_LOGITS, *OF_WEIGHTS, *LASTING)}

__all__ = [
    "METHODS", "RMU", "SRMU", "AdaptiveRMU", "Edit", "Method", "Misdirection", "MultiSite",
    "Objective", "RenameScrub", "WeightWalk",
]  # fmt: skip
