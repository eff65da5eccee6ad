"""The parts of a store: logs, objects, and the names of versions."""
