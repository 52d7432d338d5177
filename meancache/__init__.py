"""The algorithm: sigma grids, folding of schedules into weights, the schedule file, the loop.

Nothing here imports torch, except `diffusers_scheduler`, which is imported where it is used.
"""
