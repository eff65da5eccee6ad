"""The HTTP side: which variant a request names, and the routes that show and change what is served. No vLLM here."""
