"""What every script needs to run: settings, files, checkpoints, processes and errors."""
