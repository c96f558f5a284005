"""fedss."""
