"""Helpers for every other package."""
