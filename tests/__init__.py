"""The tests; a package, so that ``trial tests`` finds them."""
