"""Where a store's objects live. One small protocol; the local folder is the default."""

from edit_store.backends.local import LocalFolder
from edit_store.backends.memory import Memory
from edit_store.backends.protocol import AlreadyExists, Backend, open_backend

__all__ = ["AlreadyExists", "Backend", "LocalFolder", "Memory", "open_backend"]
