"""Read data files and Hub data sets, and check their rows and columns."""
