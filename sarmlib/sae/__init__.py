"""TopK sparse autoencoders: model, sparse kernels, training, foreign formats."""
