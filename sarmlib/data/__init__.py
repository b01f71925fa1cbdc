"""Corpora, preference pairs and benchmark rows: from the hub, from local files, or from the toy world."""
