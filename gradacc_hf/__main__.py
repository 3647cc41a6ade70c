"""python -m gradacc_hf …: the `gradacc` command."""

from gradacc_hf.cli.main import main

main()
