"""`python -m gradacc_hf.bench`."""

from gradacc_hf.bench.cli import main

main()
