"""A grid of runs -> a table, pictures and a page: methods with and without SPO, over seeds."""

from spo_jax.study.evidence import read_evidence
from spo_jax.study.grid import StudyConfig, read_study
from spo_jax.study.results_page import make_study_page
from spo_jax.study.runner import run_study

__all__ = ["StudyConfig", "make_study_page", "read_evidence", "read_study", "run_study"]
