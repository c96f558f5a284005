"""Records of a run or of a comparison -> one self-contained HTML page."""

from fedss.report.page import write_report

__all__ = ["write_report"]
