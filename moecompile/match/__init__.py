"""Finds what a model has: linears, pointwise functions, FFNs, experts and their regions. Changes nothing."""
