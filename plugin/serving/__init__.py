"""A name becomes a lease on a slot, a store head becomes a swap. Runs in the API process."""
