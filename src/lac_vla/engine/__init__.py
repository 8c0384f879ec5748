"""The engine: what runs a model over cached keys and values, for any number of sessions."""
