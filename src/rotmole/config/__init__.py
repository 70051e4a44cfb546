"""One run is one YAML file: its schema, how it is read and checked, and templates to start from."""
