"""Scoring: what a model answers -> how good it is, in [0, 1]."""
