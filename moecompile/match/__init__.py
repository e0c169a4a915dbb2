"""What a model has: linears, pointwise functions, FFNs, experts, and the regions that hold them. Nothing is changed."""
