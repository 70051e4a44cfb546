"""Inspection: what every expert, weight and angle of a mixture did, in words and numbers."""
