"""Turns names into leases on slots, and store heads into swaps. Runs in the API process."""
