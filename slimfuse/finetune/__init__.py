"""Training: one loop, its losses."""
