"""Configuration: schema, presets, overrides from the command line."""
