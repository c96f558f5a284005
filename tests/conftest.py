"""Settings of all tests.

torch gets one thread, here and in the processes that tests start: networks are so small that two
threads take longer than one, and pytest-xdist has a process on each core. What several threads do
is tested where a test sets their number.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once, when it is imported

from hypothesis import settings

settings.register_profile("fedss", deadline=None)  # a timing is never a test
settings.load_profile("fedss")
