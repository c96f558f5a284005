"""Where the time of a round goes."""

import time


class PhaseTimer:
    """Seconds by phase. After a round's record comes its checkpoint: it counts to the next."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end_phase(self, phase: str) -> None:
        """The time since the last call belongs to this phase."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def restart(self) -> dict[str, float]:
        """Seconds by phase since the last restart."""
        seconds, self._seconds = self._seconds, {}
        self._last = time.perf_counter()
        return seconds
