"""These tests need the plugin installed; the orchestrator's own suite runs them so, in test_foreign_plugin.py."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("topmean") else ["tests"]
