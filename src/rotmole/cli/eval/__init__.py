"""``rotmole eval``: one target, several on the same rows, or tasks of lm_eval."""
