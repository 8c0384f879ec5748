"""Pictures, videos and plots that evaluation, serving and report share."""
