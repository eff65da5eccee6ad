"""The server's settings, declared once, and complete example configurations."""

from vllm_edits.server_config.settings import EditSettings, Reserve, read_settings

__all__ = ["EditSettings", "Reserve", "read_settings"]
