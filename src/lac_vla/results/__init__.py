"""Episode records, metrics, statistics, and the tables made of them."""
