"""Ready-made settings, as YAML."""
