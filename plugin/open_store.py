"""Opens the store for reading, as the settings describe it. Used in the API process and in every worker."""

from __future__ import annotations

from pathlib import Path

from vllm_edits.edit_store.reading.cache import NodeCache
from vllm_edits.edit_store.reading.reader import Reader
from vllm_edits.edit_store.signing import SigningKey
from vllm_edits.edit_store.storage.store import EditStore
from vllm_edits.edit_store.trust import Trust
from vllm_edits.server_config.settings import EditSettings


def open_reader(settings: EditSettings, *, signs: bool = False) -> Reader:
    """The reader of the store in the settings. SettingsError or StoreUnavailable if it cannot be opened.

    signs: True if this process appends to the store. Only then the private key is read: no worker ever holds it.
    """
    cache = NodeCache(Path(settings.cache_folder) if settings.cache_folder else None, settings.cache_bytes)
    signer = SigningKey.load(Path(settings.signing_key_file)) if signs and settings.signing_key_file else None
    trust = Trust.configured(settings.trust_file, settings.signatures)
    return Reader(EditStore(settings.store, signer=signer), trust, cache)
