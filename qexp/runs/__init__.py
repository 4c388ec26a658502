"""Run folders: their names, the files in them, and reading them again."""
