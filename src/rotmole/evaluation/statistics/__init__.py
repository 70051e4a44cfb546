"""Statistics of figures: intervals, paired differences and tests, resampled metrics."""
