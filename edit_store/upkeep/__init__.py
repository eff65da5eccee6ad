"""Maintenance of a store: checks, garbage collection, and transfer of versions to another store."""
