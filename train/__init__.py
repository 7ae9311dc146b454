"""Many small GPTs at once, in any number format: studies, packs of runs, and what became of them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.adaptive import run_strategy
    from train.alarms import alarm_rows, point_of_no_return
    from train.early_warning import warning_skill
    from train.equivalence import equivalent_means, equivalent_rates, seeds_for_equivalence
    from train.execute import Outcome, run_study
    from train.lead_times import incremental, lead_time
    from train.merge import merge_studies
    from train.own_losses import by_group, history_of_frame, own_stability
    from train.progress import RichObserver
    from train.proportions import Pairs, clopper_pearson_interval, paired_interval, pairs_of, wilson_interval
    from train.rates import stability_table
    from train.sample_size import seeds_needed
    from train.seed_cube import seed_grid, study_runs
    from train.sensitivity import lr_sensitivity
    from train.stability import DivergenceSettings, divergence
    from train.status import study_status
    from train.store import open_study
    from train.study import Study, StudyError
    from train.study_alarms import study_warnings
    from train.study_file import read_study
    from train.verdicts import VerdictSettings, verdict
    from train.window import stable_window

__all__ = [
    "DivergenceSettings",
    "Outcome",
    "Pairs",
    "RichObserver",
    "Study",
    "StudyError",
    "VerdictSettings",
    "alarm_rows",
    "by_group",
    "clopper_pearson_interval",
    "divergence",
    "equivalent_means",
    "equivalent_rates",
    "history_of_frame",
    "incremental",
    "lead_time",
    "lr_sensitivity",
    "merge_studies",
    "open_study",
    "own_stability",
    "paired_interval",
    "pairs_of",
    "point_of_no_return",
    "read_study",
    "run_strategy",
    "run_study",
    "seed_grid",
    "seeds_for_equivalence",
    "seeds_needed",
    "stability_table",
    "stable_window",
    "study_runs",
    "study_status",
    "study_warnings",
    "verdict",
    "warning_skill",
    "wilson_interval",
]


def __getattr__(name: str) -> Any:
    """Import the module that has a name when the name is asked for: texts can be listed without waiting for torch."""
    modules = {
        "adaptive": ("run_strategy",),
        "alarms": (
            "alarm_rows",
            "point_of_no_return",
        ),
        "early_warning": ("warning_skill",),
        "equivalence": (
            "equivalent_means",
            "equivalent_rates",
            "seeds_for_equivalence",
        ),
        "execute": (
            "Outcome",
            "run_study",
        ),
        "lead_times": (
            "incremental",
            "lead_time",
        ),
        "merge": ("merge_studies",),
        "own_losses": (
            "by_group",
            "history_of_frame",
            "own_stability",
        ),
        "progress": ("RichObserver",),
        "proportions": (
            "Pairs",
            "clopper_pearson_interval",
            "paired_interval",
            "pairs_of",
            "wilson_interval",
        ),
        "rates": ("stability_table",),
        "sample_size": ("seeds_needed",),
        "seed_cube": (
            "study_runs",
            "seed_grid",
        ),
        "sensitivity": ("lr_sensitivity",),
        "stability": (
            "DivergenceSettings",
            "divergence",
        ),
        "status": ("study_status",),
        "store": ("open_study",),
        "study": (
            "Study",
            "StudyError",
        ),
        "study_alarms": ("study_warnings",),
        "study_file": ("read_study",),
        "verdicts": (
            "VerdictSettings",
            "verdict",
        ),
        "window": ("stable_window",),
    }
    for module, names in modules.items():
        if name in names:
            return getattr(importlib.import_module(f"train.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
