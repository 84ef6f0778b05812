"""The page of an evaluation: one HTML file that loads nothing, made from `Content` alone."""

from pipelines.evaluation.report_page.page import page

__all__ = ["page"]
