"""What makes a script run: settings, files, checkpoints, processes, errors."""
