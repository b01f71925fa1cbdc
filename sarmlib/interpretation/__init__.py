"""Feature interpretation: contexts, explainers, judges."""
