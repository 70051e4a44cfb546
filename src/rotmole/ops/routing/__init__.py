"""The scaling gate: how experts are scored, selected, weighed and kept in balance."""
