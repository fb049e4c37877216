"""Model families as data: which tensors form a layer, which are tied, where experts stand."""
