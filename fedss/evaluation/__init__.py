"""Retrieval, verification, and what an evaluation is worth."""
