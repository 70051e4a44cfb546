"""The rotation gate: the modes, the table of them, and their gradients by hand."""
