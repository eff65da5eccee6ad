"""What exposure logs come to. Needs no server: runs in the command's process."""
