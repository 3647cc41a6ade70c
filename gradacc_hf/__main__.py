"""python -m gradacc_hf …: the `gradacc` command."""

from gradacc_hf.cli import main

main()
