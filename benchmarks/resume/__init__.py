"""Runs that are interrupted and resumed as printed, compared with undisturbed ones."""
