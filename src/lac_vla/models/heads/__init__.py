"""Action heads: what turns the decoder's states into actions, and the losses that they are trained by."""
