"""What layers know of the batch at hand, and what they do with it."""
