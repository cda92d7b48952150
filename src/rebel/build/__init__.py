"""Settings -> objects: the one part that knows every class."""
