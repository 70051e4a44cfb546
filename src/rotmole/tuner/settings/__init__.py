"""The settings of the adapter: fields, rules, presets, and what differs from module to module."""
