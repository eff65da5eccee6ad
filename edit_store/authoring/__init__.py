"""The author's side: edits computed from a model, one published method a file. Needs torch; knows nothing of vLLM."""
