"""Many small GPTs at once, in any number format: studies, packs of runs, and what became of them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.adaptive import run_strategy
    from train.execute import Outcome, run_study
    from train.merge import merge_studies
    from train.progress import RichObserver
    from train.proportions import clopper_pearson_interval, wilson_interval
    from train.rates import stability_table
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
    "clopper_pearson_interval",
    "divergence",
    "merge_studies",
    "open_study",
    "read_study",
    "run_strategy",
    "run_study",
    "stability_table",
    "study_status",
    "wilson_interval",
]


def __getattr__(name: str) -> Any:
    """Import the module that has a name when the name is asked for: texts can be listed without waiting for torch."""
    modules = {
        "adaptive": ("run_strategy",),
        "execute": ("Outcome", "run_study"),
        "merge": ("merge_studies",),
        "progress": ("RichObserver",),
        "proportions": ("clopper_pearson_interval", "wilson_interval"),
        "rates": ("stability_table",),
        "stability": ("DivergenceSettings", "divergence"),
        "status": ("study_status",),
        "store": ("open_study",),
        "study": ("Study", "StudyError"),
        "study_file": ("read_study",),
    }
    for module, names in modules.items():
        if name in names:
            return getattr(importlib.import_module(f"train.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
