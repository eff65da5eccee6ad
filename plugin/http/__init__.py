"""The HTTP side: the middleware that reads the variant of a request, and the routes below /v1/edits. No vLLM here."""
