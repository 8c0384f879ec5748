"""Training: the bundled VLA from demonstrations (:mod:`lac_vla.training.pretrain`)."""
