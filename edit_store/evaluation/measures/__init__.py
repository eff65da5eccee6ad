"""Every measure, a module for each. Modules in this folder are found without a list."""

from vllm_edits.edit_store.registry import import_modules


def find() -> None:
    """Import every measure, so that all are registered."""
    import_modules(__name__, __path__)
