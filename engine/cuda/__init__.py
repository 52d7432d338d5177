"""CUDA for the runtimes: memory, queues, captured work, tensors. Importing this imports no CUDA.

`device` is the protocol, `driver` its implementation on NVIDIA's driver, `tensors` and `runtime`
what every backend on a GPU shares.
"""
