"""The report: one page, which needs no other file, of how a project came to its result."""

from halfmap.workflow.report.page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]
