"""Checkpoints that count: written whole, sealed, found again, pruned."""
