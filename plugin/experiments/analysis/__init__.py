"""Analysis of exposure logs. Runs in the command's process, without a server."""
