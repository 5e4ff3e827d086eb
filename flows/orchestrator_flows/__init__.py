"""Prefect flows over the core: thin."""
