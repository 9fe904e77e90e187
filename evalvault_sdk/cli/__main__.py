"""`python -m evalvault_sdk.cli`: the command, where its script is not on the PATH."""

from evalvault_sdk.cli import main

main()
