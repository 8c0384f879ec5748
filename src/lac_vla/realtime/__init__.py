"""The time that a frame takes on a device, and how its work is held within a deadline."""
