"""The page of ``fedss serve``."""
