"""The reading side of a store in a server: new entries, trusted signatures, and copies on the node."""
