"""What the bundled VLAs are trained by: a loss per action head, over one trunk."""
