"""A robot's side of the wire: messages, connections, and a policy session behind a server."""

KEY_VARIABLE = "LAC_API_KEY"
"""Environment variable that holds the API key. It is never an argument: those are visible to all processes."""
