"""The experts of one layer: parameters, how they start, and the ways to compute them."""
