"""Simulators: adapters that turn a benchmark into frames and actions. They know no model and no policy."""
