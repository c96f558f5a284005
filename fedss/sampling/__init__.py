"""How negatives are drawn."""
