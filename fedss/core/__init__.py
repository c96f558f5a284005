"""Algorithm 1 of FedSS: what a round computes."""
