"""Base models: hub ids, local folders, GGUF files and the built-in one; and safe file writing."""
