"""Running a checkpoint."""
