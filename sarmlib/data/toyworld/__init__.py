"""The toy world: a generated English-like world whose truth is known."""
