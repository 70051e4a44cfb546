"""``rotmole compare``: a study from its file to its results."""
