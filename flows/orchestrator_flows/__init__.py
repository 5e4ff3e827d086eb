"""Prefect flows over the core: thin.

`engine` runs a specification from the command line, `pipeline` holds the flow and its tasks, `server` and
`server_process` are the Prefect server that a run brings along when there is no other.
"""
