"""From yaml to objects, and error messages about a configuration."""
