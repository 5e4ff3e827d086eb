"""The conformance kit behind `orchestrator.testing`: one module per method kind, and what they share."""
