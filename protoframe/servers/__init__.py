"""Ready-made servers, each built on the public face alone."""
