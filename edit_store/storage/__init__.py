"""The log, the objects and the names that a store is made of."""
