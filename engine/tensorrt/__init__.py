"""TensorRT: plans built from a bundle's graphs, and the runtime that executes them.

The data-centre library `tensorrt` and `tensorrt_rtx`, for GeForce and workstation GPUs, are two
flavours of one interface. What differs is asked of the module at hand (`hasattr`), not of its
version. Importing this package imports neither.
"""
