"""Reports of evaluations and training runs: overlay pictures, videos, and self-contained HTML pages."""

from lac_vla.report.evaluation import build_report
from lac_vla.report.tradeoff import tradeoff
from lac_vla.report.training import build_training_report

__all__ = ["build_report", "build_training_report", "tradeoff"]
