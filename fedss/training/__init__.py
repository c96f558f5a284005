"""Train one model, or compare several."""
