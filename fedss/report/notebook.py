"""What a notebook shows of a run: its report, and a chart of it."""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class ReportPage:
    """A report, which a notebook shows in place; ``path`` is its file."""

    path: Path

    def _repr_html_(self) -> str:
        # A frame keeps the page's style, and the notebook's, to themselves.
        page = escape(self.path.read_text(encoding="utf-8"))
        style = "width: 100%; height: 80vh; border: 1px solid #8888"
        return f'<iframe title="fedss report" style="{style}" srcdoc="{page}"></iframe>'


@dataclass(frozen=True)
class Plot:
    """A chart, which a notebook shows in place; ``png`` is its file's content."""

    png: bytes = field(repr=False)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.png, {"width": 640}
