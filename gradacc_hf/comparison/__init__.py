"""`gradacc compare`: the same training by several loops, side by side."""
