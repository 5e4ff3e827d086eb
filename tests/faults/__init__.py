"""Killing runs at chosen moments, and checking what the next run makes of what they left."""
