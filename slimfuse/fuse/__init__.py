"""Fusion: closed-form refit and its controls."""
