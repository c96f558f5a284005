"""Sampled objectives, and the methods that are made of them."""
