"""``rotmole generate``: from prompts to answers, and their files."""
