"""The fault campaign: kills, full disks, damaged files."""
