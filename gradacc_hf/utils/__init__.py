"""Files, signals, devices and random numbers, shared by all packages."""
