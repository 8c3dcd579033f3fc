"""Engines: a policy in, samples out. They never score."""
