"""`python -m gradacc_hf.bench`."""

from gradacc_hf.bench import main

main()
