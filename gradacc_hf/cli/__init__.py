"""The `gradacc` command."""
