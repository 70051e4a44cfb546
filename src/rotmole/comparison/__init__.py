"""A fair comparison of methods: one study file, many run folders, one set of results."""
