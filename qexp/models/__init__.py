"""Model sources (hub, folder, GGUF, finished run, random), and their preparation."""
