"""Commands that are not a run: `qexp NAME`, one file each."""
