"""`python -m loadtests.bench`: see command.py."""

from loadtests.bench.command import app

app()
