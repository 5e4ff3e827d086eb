"""Prefect flows over the core: thin.

`engine` runs a specification from the command line, `pipeline` holds the flow and its tasks, `nights` and `heal` what
becomes of runs that come too late, too early or were killed; `server` and `server_process` are the Prefect server that
a run brings along when there is no other.
"""
