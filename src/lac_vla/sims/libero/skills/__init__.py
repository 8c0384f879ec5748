"""The skills of LIBERO's scripted expert, one module per kind."""
