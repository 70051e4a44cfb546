"""Inspection: what every expert, weight and angle of a trained mixture did, in words and numbers."""
