"""Files, signals, devices and random numbers: what all packages share."""
