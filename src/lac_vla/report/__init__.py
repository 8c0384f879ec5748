"""Reports of evaluations: overlay pictures, videos, and one self-contained HTML page."""

from lac_vla.report.page import build_report

__all__ = ["build_report"]
