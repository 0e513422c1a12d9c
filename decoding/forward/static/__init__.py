"""The trunk of well-known models as functions of tensors: fewer kernels, grouped attention, packed weights, one graph."""
