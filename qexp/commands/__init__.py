"""Commands other than runs: `qexp NAME`, one module each."""
