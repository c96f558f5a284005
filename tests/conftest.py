"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("fedss", deadline=None)  # a timing is never a test
settings.load_profile("fedss")
