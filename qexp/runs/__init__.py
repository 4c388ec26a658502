"""A run is a folder: its name, what is written there, how it is read again."""
