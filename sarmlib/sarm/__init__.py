"""The SARM reward model: model, training, attribution, steering, released checkpoints."""
