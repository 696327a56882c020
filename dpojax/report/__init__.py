"""A report of runs and experiments: one HTML page that needs nothing beside itself, and Markdown."""

from dpojax.report.blocks import Report
from dpojax.report.content import report_of
from dpojax.report.markdown import markdown_page
from dpojax.report.page import html_page
from dpojax.report.read import Experiment, Run, read_all, title_of

__all__ = ["Experiment", "Report", "Run", "html_page", "markdown_page", "read_all", "report_of", "title_of"]
