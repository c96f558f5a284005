"""How often an attack was right."""

from dataclasses import dataclass

import numpy as np

from fedss.runs.audits import Finding

MARKS = (1, 2, 5, 20)
"""The rounds after which attacks are judged; and after the last."""
ROWS = "rows asked for"
"""Among what most attacks choose."""


@dataclass
class Score:
    """Counts over messages or clients: what is named, what of it is right, what there is."""

    count: int = 0
    right: int = 0
    named: int = 0
    there: int = 0

    def add(self, named: np.ndarray, there: np.ndarray) -> None:
        """What an attack names, and what there is to name; each once."""
        self.count += 1
        self.right += len(np.intersect1d(named, there, assume_unique=True))
        self.named += len(named)
        self.there += len(there)

    @property
    def precision(self) -> float:
        """The share of what is named that is right; 0 where nothing is."""
        return self.right / max(self.named, 1)

    def finding(self, name: str, rounds: int, guess: float, among: str = ROWS) -> Finding:
        """The same as shares."""
        recall = self.right / max(self.there, 1)
        return Finding(name, rounds, self.precision, recall, guess, among, hidden=False)
