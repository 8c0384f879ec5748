"""The losses that the bundled VLAs are trained by: one per action head, over one trunk."""
