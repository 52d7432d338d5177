"""Calibration: record trajectories, cost the edges of the step graph, choose nodes, bake.

Nothing here imports torch, except `recording`, which is imported where it is used.
"""
