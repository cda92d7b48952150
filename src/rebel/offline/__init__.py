"""Completions that somebody else drew: read, in tokens, and regressed with the initial policy as the anchor."""
