"""`python -m vlmcut`."""

from vlmcut.cli import main

main()
