"""The Hydra application: jobs, the record of a sweep, launchers, dry runs, searches."""
