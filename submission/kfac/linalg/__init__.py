"""Tensors in, tensors out: the mathematics of K-FAC without models, state or ranks."""
