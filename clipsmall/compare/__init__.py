"""Trains a grid of runs and compares them: statistics, plots, models side by side, a verdict."""
