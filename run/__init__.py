"""What surrounds training: the run's folder, checkpoints, log, signals and processes."""
