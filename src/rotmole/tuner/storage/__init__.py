"""Saved adapters: their names, their weights, and the base model they belong to."""
