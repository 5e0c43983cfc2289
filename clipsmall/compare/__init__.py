"""Objectives, batch sizes and tricks side by side: a grid of runs, their statistics, pictures and a
verdict.
"""
