"""What an adapter does inside: whether it keeps the laws of its base model."""
