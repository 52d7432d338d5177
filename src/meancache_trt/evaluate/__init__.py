"""Measure methods at budgets on pictures that nobody was calibrated on, and report it.

competitors   which schedules are measured
renderer      what makes pictures: a bundle's engine, or (`torch_renderer`) a diffusers pipeline
measure       render, compare, keep: nothing finished is done again
report        one page with tables, plots and pictures
"""
