from tests.reports import an_empty_report

__all__ = ["an_empty_report"]
