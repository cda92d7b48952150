"""REBEL for generative models."""
