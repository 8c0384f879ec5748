"""What the scripted expert of LIBERO can do with its hand, one module per kind of skill."""
