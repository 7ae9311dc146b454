"""Many small GPTs at once, in any number format: studies, packs of runs, and what became of them."""

from train.execute import Outcome, run_study
from train.progress import RichObserver
from train.rates import stability_table, wilson_interval
from train.stability import DivergenceSettings, divergence
from train.status import study_status
from train.store import open_study
from train.study import Study, StudyError
from train.study_file import read_study

__all__ = [
    "DivergenceSettings",
    "Outcome",
    "RichObserver",
    "Study",
    "StudyError",
    "divergence",
    "open_study",
    "read_study",
    "run_study",
    "stability_table",
    "study_status",
    "wilson_interval",
]
